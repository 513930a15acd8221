"""Tile functions in CUDA C++ (csrc/cuda.cu): fp32 tiles on a CUDA device, queued on torch's current
stream. The contract is in `tiles/torch.py`.

The library holds the CUDA runtime but not torch, and loads on a machine without a driver.
"""

import contextlib
import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from opsd_kernels.divergence import Clip, Divergence, LogitTransform
from opsd_kernels.tiles.c_interface import Options, Tile, options, pointer, tile

TEMPORARIES = 6 / 4096  # each chunk's part of six sums
LIBRARY = Path(__file__).parent.parent / "libopsd_cuda.so"


def unusable_because() -> str | None:
    """Of the installation: whether there is a device is seen elsewhere."""
    if not LIBRARY.exists():
        return "the CUDA kernels are not built; with nvcc at hand run: OPSD_CUDA=1 pip install -e ."
    try:
        _library()
    except OSError as error:
        return f"{LIBRARY} does not load: {error}"
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    address, described = ctypes.c_void_p, ctypes.POINTER(Options)
    for name, arguments in (
        ("normalisers", ()),
        ("sums", ()),
        ("gradient", (address, ctypes.c_int32)),
        ("log_prob_normalisers", (address,)),
        ("log_prob_gradient", (address, address)),
    ):
        function = getattr(library, f"opsd_cuda_{name}")
        function.argtypes = [
            *(ctypes.POINTER(Tile), *arguments, described),
            *(address, ctypes.c_int32, address),  # parts, device, stream
        ]
        function.restype = ctypes.c_int32
    library.opsd_cuda_parts.argtypes = [ctypes.c_int64, ctypes.c_int64]
    library.opsd_cuda_parts.restype = ctypes.c_int64
    library.opsd_cuda_error.argtypes = [ctypes.c_int32]
    library.opsd_cuda_error.restype = ctypes.c_char_p
    return library


def _call(name: str, tensors: tuple, described: Options, *arguments) -> None:
    """Queue one function; `tensors` as `c_interface.tile` takes them."""
    library, student = _library(), tensors[0]
    n, v = student.shape
    parts = student.new_empty(library.opsd_cuda_parts(n, v))
    # The library sets the device too, in its own copy of the CUDA runtime: torch's must agree.
    with torch.cuda.device(student.device) if student.is_cuda else contextlib.nullcontext():
        status = getattr(library, f"opsd_cuda_{name}")(
            tile(*tensors), *arguments, described, parts.data_ptr(), *_queue(student.device)
        )
    if status != 0:
        reason = library.opsd_cuda_error(status).decode()
        raise RuntimeError(
            f"opsd_kernels: the CUDA kernel {name} did not start on {student.device}: {reason} "
            "(it needs compute capability 8.0)"
        )


def _queue(device: torch.device) -> tuple[int, int]:
    """(device number, stream) to launch on."""
    return device.index, torch.cuda.current_stream(device).cuda_stream


def _floats(x: Tensor | None) -> int | None:
    return None if x is None else pointer(x, x.device, torch.float32)


def normalisers(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    transform: LogitTransform,
    state: Tensor,
) -> None:
    _call("normalisers", (student, teacher, bias, teacher_bias, state), options(transform))


def sums(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    divergence: Divergence,
    transform: LogitTransform,
    clip: Clip | None,
    state: Tensor,
) -> None:
    tensors = (student, teacher, bias, teacher_bias, state)
    _call("sums", tensors, options(transform, divergence, clip))


def gradient_(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    divergence: Divergence,
    transform: LogitTransform,
    clip: Clip | None,
    state: Tensor,
    row_weight: Tensor | None,
    sums_known: bool = True,
) -> None:
    assert sums_known or clip is None or clip.kind != "entry"
    tensors = (student, teacher, bias, teacher_bias, state)
    described = options(transform, divergence, clip)
    _call("gradient", tensors, described, _floats(row_weight), sums_known)


def log_prob_normalisers(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    state: Tensor,
) -> None:
    address = pointer(targets, logits.device, torch.int64)
    _call("log_prob_normalisers", (logits, None, bias, None, state), options(transform), address)


def log_prob_gradient_(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    state: Tensor,
    row_weight: Tensor,
) -> None:
    address = pointer(targets, logits.device, torch.int64)
    _call(
        "log_prob_gradient",
        (logits, None, bias, None, state),
        options(transform),
        address,
        _floats(row_weight),
    )
