"""Tile functions in C++ (csrc/cpu.cpp): fp32 tiles on the CPU. The contract is in
`tiles/torch.py`.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from opsd_kernels.divergence import Clip, Divergence, LogitTransform
from opsd_kernels.tiles.c_interface import Options, Tile, options, pointer, tile

TEMPORARIES = 0  # works in place
CPU = torch.device("cpu")
LIBRARY = Path(__file__).parent.parent / "libopsd_cpu.so"


def unusable_because() -> str | None:
    if not LIBRARY.exists():
        return "the C++ kernels are not built; with a C++ compiler at hand run: pip install -e ."
    try:
        _library()
    except OSError as error:
        return f"{LIBRARY} does not load: {error}"
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    # The library names no OpenMP runtime (setup.py, `openmp`): it takes the one that torch has made
    # visible to all, and its threads. A torch that has none, or hides it, leaves the system's.
    if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(LIBRARY))
    shape, described = ctypes.POINTER(Tile), ctypes.POINTER(Options)
    for name, arguments in (
        ("normalisers", ()),
        ("sums", ()),
        ("gradient", (ctypes.c_void_p, ctypes.c_int32)),
        ("rows", (ctypes.c_void_p,)),
        ("log_prob_normalisers", (ctypes.c_void_p,)),
        ("log_prob_gradient", (ctypes.c_void_p, ctypes.c_void_p)),
    ):
        function = getattr(library, f"opsd_{name}")
        function.argtypes, function.restype = [shape, *arguments, described], None
    library.opsd_instruction_set.restype = ctypes.c_char_p
    return library


def instruction_set() -> str:
    """Which of the compiled variants serves this processor: avx512, avx2 or baseline."""
    name: bytes = _library().opsd_instruction_set()
    return name.decode()


def _floats(x: Tensor | None) -> int | None:
    return pointer(x, CPU, torch.float32)


def normalisers(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    transform: LogitTransform,
    state: Tensor,
) -> None:
    shape = tile(student, teacher, bias, teacher_bias, state)
    _library().opsd_normalisers(shape, options(transform))


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
    shape = tile(student, teacher, bias, teacher_bias, state)
    _library().opsd_sums(shape, options(transform, divergence, clip))


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
    shape = tile(student, teacher, bias, teacher_bias, state)
    described = options(transform, divergence, clip)
    _library().opsd_gradient(shape, _floats(row_weight), sums_known, described)


def rows(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    divergence: Divergence,
    transform: LogitTransform,
    clip: Clip | None,
    state: Tensor,
    row_weight: Tensor | None,
) -> None:
    shape = tile(student, teacher, bias, teacher_bias, state)
    _library().opsd_rows(shape, _floats(row_weight), options(transform, divergence, clip))


def log_prob_normalisers(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    state: Tensor,
) -> None:
    shape = tile(logits, None, bias, None, state)
    _library().opsd_log_prob_normalisers(
        shape, pointer(targets, CPU, torch.int64), options(transform)
    )


def log_prob_gradient_(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    state: Tensor,
    row_weight: Tensor,
) -> None:
    shape = tile(logits, None, bias, None, state)
    _library().opsd_log_prob_gradient(
        shape, pointer(targets, CPU, torch.int64), _floats(row_weight), options(transform)
    )
