"""Tile functions in CUDA C++ (csrc/cuda.cu): fp32 tiles on a CUDA device, on torch's current
stream. The contract is in `tiles/torch.py`.

The library contains the CUDA runtime but not torch, and loads on a machine without a driver.
"""

import contextlib
import ctypes
import functools

import torch
from torch import Tensor

from opsd_kernels.divergence import LogitTransform, Rule
from opsd_kernels.tiles.c_interface import (
    Options,
    Tile,
    find_library,
    load_library,
    options,
    pointer,
    tile,
)
from opsd_kernels.tiles.logits import Logits

OLDEST_DEVICE = (8, 0)  # compute capability
INTERFACE = 5  # OPSD_CUDA_INTERFACE of csrc/cuda.cu
TYPES = (torch.float32, torch.bfloat16, torch.float16)  # opsd::Type of csrc/cuda_chunk.h
TEMPORARIES = 8 / 4096  # each chunk's eight sums
LIBRARY = find_library("libopsd_cuda.so")


def unusable_because() -> str | None:
    """What the installation lacks; `resolve` checks whether there is a device."""
    if not LIBRARY.exists():
        return "the CUDA kernels are not built; with nvcc at hand run: OPSD_CUDA=1 pip install -e ."
    try:
        return too_old(*versions())
    except OSError as error:
        return f"{LIBRARY} does not load: {error}"


def versions() -> tuple[int, int]:
    """The CUDA versions of the driver (0: none) and of the library: 1000 * major + 10 * minor."""
    driver, runtime = ctypes.c_int32(), ctypes.c_int32()
    _library().opsd_cuda_versions(ctypes.byref(driver), ctypes.byref(runtime))
    return driver.value, runtime.value


def too_old(driver: int, runtime: int) -> str | None:
    """Why the driver is too old for the library, or None. Any driver of the same major CUDA version
    works.
    """
    if driver == 0 or driver // 1000 >= runtime // 1000:
        return None
    return (
        f"the driver is of CUDA {driver // 1000}.{driver % 1000 // 10}, and the kernels were built "
        f"with CUDA {runtime // 1000}: update the driver, or build them with an older nvcc"
    )


@functools.cache
def _library() -> ctypes.CDLL:
    library = load_library(LIBRARY, "opsd_cuda_interface", INTERFACE)
    address, described = ctypes.c_void_p, ctypes.POINTER(Options)
    out = (address, ctypes.c_int64, ctypes.c_int32)
    for name, arguments in (
        ("normalisers", ()),
        ("sums", ()),
        ("gradient", (*out, address, ctypes.c_int32)),
        ("log_prob_normalisers", (address,)),
        ("log_prob_gradient", (*out, address, address)),
    ):
        function = getattr(library, f"opsd_cuda_{name}")
        function.argtypes = [
            *(ctypes.POINTER(Tile), *arguments, described),
            *(address, ctypes.c_int32, address),  # partials, device, stream
        ]
        function.restype = ctypes.c_int32
    library.opsd_cuda_rows.argtypes = [
        *(ctypes.POINTER(Tile), *out, address, described),
        *(ctypes.c_int32, address),  # device, stream
    ]
    library.opsd_cuda_rows.restype = ctypes.c_int32
    library.opsd_cuda_row_fits.argtypes = [ctypes.c_int64, ctypes.c_int32]
    library.opsd_cuda_row_fits.restype = ctypes.c_int32
    library.opsd_cuda_partials.argtypes = [ctypes.c_int64, ctypes.c_int64]
    library.opsd_cuda_partials.restype = ctypes.c_int64
    library.opsd_cuda_error.argtypes = [ctypes.c_int32]
    library.opsd_cuda_error.restype = ctypes.c_char_p
    return library


def _call(name: str, shape: Tile, rule: Rule, state: Tensor, *arguments) -> None:
    """Queue a function that has room for its chunks' sums."""
    partials = state.new_empty(_library().opsd_cuda_partials(shape.n, shape.v))
    _queue_call(name, state, shape, *arguments, options(rule), partials.data_ptr())


def _queue_call(name: str, state: Tensor, *arguments) -> None:
    """Queue a function on the stream."""
    library, device = _library(), state.device
    # The library sets the device in its own copy of the CUDA runtime; set torch's to the same.
    with torch.cuda.device(device) if state.is_cuda else contextlib.nullcontext():
        status = getattr(library, f"opsd_cuda_{name}")(*arguments, *_queue(device))
    if status != 0:
        reason = library.opsd_cuda_error(status).decode()
        raise RuntimeError(
            f"opsd_kernels: the CUDA kernel {name} did not start on {device}: {reason} "
            f"(it needs compute capability {'.'.join(map(str, OLDEST_DEVICE))})"
        )


def _queue(device: torch.device) -> tuple[int, int]:
    """(device number, stream) for launches."""
    return device.index, torch.cuda.current_stream(device).cuda_stream


def _floats(x: Tensor | None) -> int | None:
    return None if x is None else pointer(x, x.device, torch.float32)


def normalisers(student: Logits, teacher: Logits, rule: Rule, state: Tensor) -> None:
    _call("normalisers", tile(student, teacher, state), rule, state)


def sums(student: Logits, teacher: Logits, rule: Rule, state: Tensor) -> None:
    _call("sums", tile(student, teacher, state), rule, state)


def gradient_(
    student: Logits,
    teacher: Logits,
    rule: Rule,
    state: Tensor,
    row_weight: Tensor | None,
    sums_known: bool = True,
    out: Tensor | None = None,
) -> None:
    assert sums_known or rule.entry_clip is None
    shape = tile(student, teacher, state)
    written = _written(student, out)
    _call("gradient", shape, rule, state, *written, _floats(row_weight), sums_known)


@functools.cache
def row_fits(device: torch.device, entries: int) -> bool:
    """Whether `rows` can run: a row of both roles fits the shared memory of a cluster of blocks
    (compute capability 9.0 or newer, and up to some 400 000 entries).
    """
    return bool(_library().opsd_cuda_row_fits(entries, _queue(device)[0]))


def rows(
    student: Logits,
    teacher: Logits,
    rule: Rule,
    state: Tensor,
    row_weight: Tensor | None,
    out: Tensor | None = None,
) -> None:
    shape, written = tile(student, teacher, state), _written(student, out)
    _queue_call("rows", state, shape, *written, _floats(row_weight), options(rule))


def _written(logits: Logits, out: Tensor | None) -> tuple[int | None, int, int]:
    """Where the gradient goes: address of the first entry, stride, type."""
    x = logits.product if out is None else out
    return pointer(x, logits.product.device, x.dtype), x.stride(0), TYPES.index(x.dtype)


def log_prob_normalisers(
    logits: Logits, targets: Tensor, transform: LogitTransform, state: Tensor
) -> None:
    shape, chosen = tile(logits, None, state), pointer(targets, state.device, torch.int64)
    _call("log_prob_normalisers", shape, Rule(transform=transform), state, chosen)


def log_prob_gradient_(
    logits: Logits,
    targets: Tensor,
    transform: LogitTransform,
    state: Tensor,
    row_weight: Tensor,
    out: Tensor | None = None,
) -> None:
    shape, chosen = tile(logits, None, state), pointer(targets, state.device, torch.int64)
    rule = Rule(transform=transform)
    written = _written(logits, out)
    _call("log_prob_gradient", shape, rule, state, *written, chosen, _floats(row_weight))
