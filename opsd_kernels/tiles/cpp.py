"""Tile functions in C++ (csrc/cpu.cpp): fp32 tiles on the CPU. The contract is in
`tiles/torch.py`.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from opsd_kernels.divergence import CLIPS, DIVERGENCES, Clip, Divergence, LogitTransform
from opsd_kernels.tiles import state as states

TILES = 2  # works in place
LIBRARY = Path(__file__).parent.parent / "libopsd_cpu.so"


class _Options(ctypes.Structure):
    """`struct options` of csrc/cpu.h."""

    _fields_ = (
        ("divergence", ctypes.c_int32),
        ("clip", ctypes.c_int32),
        ("beta", ctypes.c_float),
        ("clip_threshold", ctypes.c_float),
        ("temperature", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


def unusable_because() -> str | None:
    if not LIBRARY.exists():
        return "the C++ kernels are not built; run: pip install -e ."
    try:
        _library()
    except OSError as error:
        return f"{LIBRARY} does not load: {error}"
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    # After torch: the library's OpenMP runtime is then the one that torch has already loaded, with
    # its threads.
    library = ctypes.CDLL(str(LIBRARY))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    options = ctypes.POINTER(_Options)
    library.opsd_divergence_rows.argtypes = [
        *(pointer, pointer, pointer, pointer, pointer, pointer, pointer),
        *(size, size, size, size, size, options),
    ]
    library.opsd_log_prob_rows.argtypes = [
        *(pointer, pointer, pointer, pointer, pointer),
        *(size, size, size, size, options),
    ]
    library.opsd_divergence_rows.restype = library.opsd_log_prob_rows.restype = None
    library.opsd_instruction_set.restype = ctypes.c_char_p
    return library


def instruction_set() -> str:
    """Which of the compiled variants serves this processor: avx512, avx2 or baseline."""
    return _library().opsd_instruction_set().decode()


def _options(
    transform: LogitTransform, divergence: Divergence | None = None, clip: Clip | None = None
) -> _Options:
    return _Options(
        divergence=0 if divergence is None else DIVERGENCES.index(divergence.name),
        clip=0 if clip is None else 1 + CLIPS.index(clip.kind),
        beta=0.5 if divergence is None else divergence.beta,
        clip_threshold=0.0 if clip is None else clip.threshold,
        temperature=transform.temperature,
        scale=transform.scale,
        softcap=0.0 if transform.softcap is None else transform.softcap,
        threads=torch.get_num_threads(),
    )


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _pointer(x: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
    if x is None:
        return None
    assert x.device.type == "cpu" and x.dtype == dtype and (x.numel() <= 1 or x.stride(-1) == 1)
    return x.data_ptr()


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
    n, v = student.shape
    stats, opposed = student.new_zeros(5, n), student.new_zeros(n)
    # Named, so that the copies live until the call returns.
    bias, teacher_bias, row_weight = map(_contiguous, (bias, teacher_bias, row_weight))
    _library().opsd_divergence_rows(
        _pointer(student),
        _pointer(teacher),
        _pointer(bias),
        _pointer(teacher_bias),
        _pointer(row_weight),
        _pointer(stats),
        _pointer(opposed),
        n,
        v,
        student.stride(0),
        teacher.stride(0),
        stats.stride(0),
        _options(transform, divergence, clip),
    )
    state[states.CLIPPED], state[states.DIVERGENCE], state[states.COUNT] = (
        stats[0],
        stats[1],
        stats[4],
    )
    state[states.DOT] = -opposed
    for role, entropy in ((states.STUDENT, stats[2]), (states.TEACHER, stats[3])):
        state[role][states.SUM], state[role][states.MOMENT] = 1.0, entropy


def log_prob_rows(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    state: Tensor,
    row_weight: Tensor | None,
) -> None:
    n, v = logits.shape
    stats = logits.new_zeros(2, n)
    bias, targets, row_weight = map(_contiguous, (bias, targets, row_weight))
    _library().opsd_log_prob_rows(
        _pointer(logits),
        _pointer(bias),
        _pointer(targets, torch.int64),
        _pointer(row_weight),
        _pointer(stats),
        n,
        v,
        logits.stride(0),
        stats.stride(0),
        _options(transform),
    )
    state[states.TARGET], state[states.MAX] = stats[0], 0.0
    state[states.SUM], state[states.MOMENT] = 1.0, stats[1]
