"""Builds the arguments of the compiled backends from tensors: the structures of csrc/cpu.h."""

import ctypes
from importlib.metadata import distributions
from pathlib import Path

import torch
from torch import Tensor

from opsd_kernels.divergence import CLIPS, DIVERGENCES, LogitTransform, Rule
from opsd_kernels.tiles.logits import Logits

INTERFACE = 3  # OPSD_INTERFACE of csrc/cpu.h


def find_library(name: str) -> Path:
    """The library's path: beside this package or, for a checkout where nothing was built, in the
    installed package (`load_library` refuses one built from other sources).
    """
    own = Path(__file__).parents[1] / name
    if own.exists():
        return own
    for installed in distributions(name="opsd-train"):
        place = Path(str(installed.locate_file(f"opsd_kernels/{name}")))
        if place.exists():
            return place
    return own


def load_library(path: Path, interface: str, number: int | None = None) -> ctypes.CDLL:
    """Load a library. Raises OSError if it does not load, or if its function `interface` returns
    another number than `number` (None: `INTERFACE`), so that it was built from other sources.
    """
    library = ctypes.CDLL(str(path))
    found = getattr(library, interface)() if hasattr(library, interface) else None
    if found != (INTERFACE if number is None else number):
        raise OSError("it was built from other sources than this Python code's: build it again")
    return library


class Transform(ctypes.Structure):
    """`struct opsd_transform`."""

    _fields_ = (
        ("temperature", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class Options(ctypes.Structure):
    """`struct opsd_options`."""

    _fields_ = (
        ("divergence", ctypes.c_int32),
        ("clip", ctypes.c_int32),
        ("beta", ctypes.c_float),
        ("clip_threshold", ctypes.c_float),
        ("student", Transform),
        ("teacher", Transform),
        ("threads", ctypes.c_int32),
    )


class Tile(ctypes.Structure):
    """`struct opsd_tile`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("student", "teacher", "bias", "teacher_bias")),
        ("state", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n", "v", "student_stride", "teacher_stride")),
        ("state_stride", ctypes.c_int64),
    )


def options(rule: Rule) -> Options:
    divergence, clip = rule.divergence, rule.clip
    return Options(
        divergence=DIVERGENCES.index(divergence.name),
        clip=0 if clip is None else 1 + CLIPS.index(clip.kind),
        beta=divergence.beta,
        clip_threshold=0.0 if clip is None else clip.threshold,
        student=_transform(rule.transform),
        teacher=_transform(rule.of_teacher),
        threads=torch.get_num_threads(),
    )


def _transform(transform: LogitTransform) -> Transform:
    softcap = 0.0 if transform.softcap is None else transform.softcap
    return Transform(transform.temperature, transform.scale, softcap)


def pointer(x: Tensor | None, device: torch.device, dtype: torch.dtype) -> int | None:
    """The address of the first entry. The last dimension must be contiguous."""
    if x is None:
        return None
    assert x.device == device and x.dtype == dtype and (x.numel() <= 1 or x.stride(-1) == 1)
    return x.data_ptr()


def tile(student: Logits, teacher: Logits | None, state: Tensor) -> Tile:
    product, bias = (None, None) if teacher is None else teacher
    tensors = (student.product, product, student.bias, bias, state)
    return Tile(
        *(pointer(x, student.product.device, torch.float32) for x in tensors),
        *student.product.shape,
        student.product.stride(0),
        0 if product is None else product.stride(0),
        state.stride(0),
    )
