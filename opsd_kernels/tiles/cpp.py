"""Tile functions in C++ (csrc/cpu.cpp): fp32 tiles on the CPU. The contract is in
`tiles/torch.py`.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from opsd_kernels.divergence import CLIPS, DIVERGENCES, Clip, Divergence, LogitTransform

TEMPORARIES = 0  # works in place
LIBRARY = Path(__file__).parent.parent / "libopsd_cpu.so"


class _Options(ctypes.Structure):
    """`struct opsd_options` of csrc/cpu.h."""

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


class _Tile(ctypes.Structure):
    """`struct opsd_tile` of csrc/cpu.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("student", "teacher", "bias", "teacher_bias")),
        ("state", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n", "v", "student_stride", "teacher_stride")),
        ("state_stride", ctypes.c_int64),
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
    tile, options = ctypes.POINTER(_Tile), ctypes.POINTER(_Options)
    for name, arguments in (
        ("normalisers", ()),
        ("sums", ()),
        ("gradient", (ctypes.c_void_p, ctypes.c_int32)),
        ("rows", (ctypes.c_void_p,)),
        ("log_prob_normalisers", (ctypes.c_void_p,)),
        ("log_prob_gradient", (ctypes.c_void_p, ctypes.c_void_p)),
    ):
        function = getattr(library, f"opsd_{name}")
        function.argtypes, function.restype = [tile, *arguments, options], None
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


def _pointer(x: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
    if x is None:
        return None
    assert x.device.type == "cpu" and x.dtype == dtype and (x.numel() <= 1 or x.stride(-1) == 1)
    return x.data_ptr()


def _tile(
    student: Tensor,
    teacher: Tensor | None,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    state: Tensor,
) -> _Tile:
    return _Tile(
        *map(_pointer, (student, teacher, bias, teacher_bias, state)),
        *student.shape,
        student.stride(0),
        0 if teacher is None else teacher.stride(0),
        state.stride(0),
    )


def normalisers(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    transform: LogitTransform,
    state: Tensor,
) -> None:
    tile = _tile(student, teacher, bias, teacher_bias, state)
    _library().opsd_normalisers(tile, _options(transform))


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
    tile = _tile(student, teacher, bias, teacher_bias, state)
    _library().opsd_sums(tile, _options(transform, divergence, clip))


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
    tile = _tile(student, teacher, bias, teacher_bias, state)
    options = _options(transform, divergence, clip)
    _library().opsd_gradient(tile, _pointer(row_weight), sums_known, options)


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
    tile = _tile(student, teacher, bias, teacher_bias, state)
    _library().opsd_rows(tile, _pointer(row_weight), _options(transform, divergence, clip))


def log_prob_normalisers(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    state: Tensor,
) -> None:
    tile = _tile(logits, None, bias, None, state)
    _library().opsd_log_prob_normalisers(tile, _pointer(targets, torch.int64), _options(transform))


def log_prob_gradient_(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    state: Tensor,
    row_weight: Tensor,
) -> None:
    tile = _tile(logits, None, bias, None, state)
    _library().opsd_log_prob_gradient(
        tile, _pointer(targets, torch.int64), _pointer(row_weight), _options(transform)
    )
