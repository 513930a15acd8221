"""Decides which backend computes a call; no other module does.

`auto` chooses among the usable ones: for fp64 torch; on the CPU cpp, then torch; on a CUDA device
triton, then cuda, then torch; elsewhere torch. On the CPU that order is measured (benchmarks/). On
CUDA it is not: until a benchmark shows that cuda is faster, triton comes first.

It also depends on the device's compute capability: cuda has code for 8.0 and later, so a T4 or V100
gets triton.
"""

import importlib
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch

from opsd_kernels.tiles import cpp, cuda, triton

# What the installation lacks, name -> reason. Devices are looked for later: if CUDA is asked for
# them at import, it does not work after a fork.
_BACKENDS = {
    "torch": None,
    "cpp": cpp.unusable_because(),
    "triton": triton.unusable_because(),
    "cuda": cuda.unusable_because(),
}
_FASTEST_FIRST = {"cpu": ("cpp",), "cuda": ("triton", "cuda")}
_NO_DEVICE = "no CUDA device"


def backends() -> dict[str, str | None]:
    """The reason why each backend is not usable here, or None if it is, by name.

    >>> backends()["torch"] is None
    True
    """
    reasons = dict(_BACKENDS)
    for name in ("triton", "cuda"):
        if reasons[name] is None and not (torch.cuda.is_available() or _serves_cpu(name)):
            reasons[name] = _NO_DEVICE
    return reasons


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that computes `name` for such tensors. Raises ValueError with the reason if none
    can.
    """
    if name == "auto":
        return _fastest(device, dtype)
    if name not in _BACKENDS:
        raise ValueError(f"backend: got {name!r}, may be one of auto, {', '.join(_BACKENDS)}")
    reason = _BACKENDS[name]
    if reason is None and name in ("triton", "cuda") and device.type == "cpu":
        reason = None if _serves_cpu(name) or torch.cuda.is_available() else _NO_DEVICE
    if reason is not None:
        raise ValueError(f"backend: got {name!r}, which is unusable here: {reason}")
    if name == "torch":
        return name
    if dtype == torch.float64:
        raise ValueError(f"backend: got {name!r} for float64 tensors, which only 'torch' serves")
    own = "cpu" if name == "cpp" else "cuda"
    if device.type != own and not (device.type == "cpu" and _serves_cpu(name)):
        served = "the CPU" if name == "cpp" else "CUDA devices"
        raise ValueError(f"backend: got {name!r} for tensors on {device}, it serves {served} only")
    if reason := _device_lacks(name, device):
        raise ValueError(f"backend: got {name!r}, which is unusable here: {reason}")
    return name


def _fastest(device: torch.device, dtype: torch.dtype) -> str:
    if dtype == torch.float64 or device.type not in _FASTEST_FIRST:
        return "torch"
    candidates = _FASTEST_FIRST[device.type]
    reasons = ""
    for name in candidates:
        reason = _BACKENDS[name] or _device_lacks(name, device)
        if reason is None:
            return name
        reasons += f"{'; ' if reasons else ''}{name!r}: {reason}"
    _warn(f"opsd_kernels: using the slower torch backend, because of {reasons}")
    return "torch"


@cache
def _warn(text: str) -> None:
    """Warn once: each `catch_warnings`, such as torch's, makes Python forget what it has said."""
    warnings.warn(text, RuntimeWarning, stacklevel=5)


def _device_lacks(name: str, device: torch.device) -> str | None:
    """Why the device cannot run a GPU backend, or None."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    least: tuple[int, int] = load(name).OLDEST_DEVICE
    if capability >= least:
        return None
    had, needed = (".".join(map(str, x)) for x in (capability, least))
    return f"{device} has compute capability {had}, and {name} needs {needed}"


def scaler(device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], None] | None:
    """triton's `scale_` for tensors on a CUDA device; None where it does not run."""
    if device.type != "cuda" or _BACKENDS["triton"] or _device_lacks("triton", device):
        return None
    found: Callable[[torch.Tensor, torch.Tensor], None] = load("triton").scale_
    return found


def _serves_cpu(name: str) -> bool:
    return name == "triton" and triton.INTERPRETED


def load(name: str) -> ModuleType:
    """Import the module of a backend that `resolve` chose."""
    return importlib.import_module(f"opsd_kernels.tiles.{name}")
