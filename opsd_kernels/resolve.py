"""Which backend serves a call: decided here and nowhere else."""

import importlib
import warnings
from types import ModuleType

import torch

from opsd_kernels.tiles import cpp

_LATER = "not in this release: only 'torch' and 'cpp' are"
_BACKENDS = {"torch": None, "cpp": cpp.unusable_because(), "triton": _LATER, "cuda": _LATER}


def backends() -> dict[str, str | None]:
    """Backend name -> None where it is usable here, otherwise the reason why it is not."""
    return dict(_BACKENDS)


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that serves `name` for such tensors. ValueError or NotImplementedError with the
    reason if there is none.
    """
    if name == "auto":
        if device.type != "cpu" or dtype == torch.float64:
            return "torch"
        if _BACKENDS["cpp"] is None:
            return "cpp"
        warnings.warn(
            f"opsd_kernels: using the slower torch backend, because of 'cpp': {_BACKENDS['cpp']}",
            RuntimeWarning,
            stacklevel=3,
        )
        return "torch"
    if name not in _BACKENDS:
        raise ValueError(f"backend: got {name!r}, may be one of auto, {', '.join(_BACKENDS)}")
    if _BACKENDS[name] is not None:
        error = NotImplementedError if _BACKENDS[name] is _LATER else ValueError
        raise error(f"backend: got {name!r}, which is unusable here: {_BACKENDS[name]}")
    if name == "cpp" and device.type != "cpu":
        raise ValueError(f"backend: got 'cpp' for tensors on {device}, it serves the CPU only")
    if name == "cpp" and dtype == torch.float64:
        raise ValueError("backend: got 'cpp' for float64 tensors, which only 'torch' serves")
    return name


def load(name: str) -> ModuleType:
    """The module of a backend that `resolve` named."""
    return importlib.import_module(f"opsd_kernels.tiles.{name}")
