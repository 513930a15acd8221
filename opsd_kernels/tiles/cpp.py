"""Tile functions in C++ (csrc/cpu.cpp): fp32 tiles on the CPU. The contract is in
`tiles/torch.py`.
"""

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

TEMPORARIES = 0  # works in place
CPU = torch.device("cpu")
LIBRARY = find_library("libopsd_cpu.so")


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
    # The library links no OpenMP runtime (setup.py, `openmp`): it uses torch's, with its threads,
    # if torch has made that visible globally. Otherwise load the system's.
    if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    library = load_library(LIBRARY, "opsd_interface")
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
    """The compiled variant that this processor uses: avx512, avx2 or baseline."""
    name: bytes = _library().opsd_instruction_set()
    return name.decode()


def _floats(x: Tensor | None) -> int | None:
    return pointer(x, CPU, torch.float32)


def normalisers(student: Logits, teacher: Logits, rule: Rule, state: Tensor) -> None:
    _library().opsd_normalisers(tile(student, teacher, state), options(rule))


def sums(student: Logits, teacher: Logits, rule: Rule, state: Tensor) -> None:
    _library().opsd_sums(tile(student, teacher, state), options(rule))


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
    _library().opsd_gradient(shape, _floats(row_weight), sums_known, options(rule))
    _move(student, row_weight, out)


def row_fits(device: torch.device, entries: int) -> bool:
    """Whether `rows` can run."""
    return True


def rows(
    student: Logits,
    teacher: Logits,
    rule: Rule,
    state: Tensor,
    row_weight: Tensor | None,
    out: Tensor | None = None,
) -> None:
    shape = tile(student, teacher, state)
    _library().opsd_rows(shape, _floats(row_weight), options(rule))
    _move(student, row_weight, out)


def _move(student: Logits, row_weight: Tensor | None, out: Tensor | None) -> None:
    """Copy the gradient to `out`. The library overwrites the products, and on a CPU products read
    gradients in fp32, so only tests need a copy.
    """
    if out is not None and row_weight is not None:
        out.copy_(student.product)


def log_prob_normalisers(
    logits: Logits, targets: Tensor, transform: LogitTransform, state: Tensor
) -> None:
    shape, chosen = tile(logits, None, state), pointer(targets, CPU, torch.int64)
    _library().opsd_log_prob_normalisers(shape, chosen, options(Rule(transform=transform)))


def log_prob_gradient_(
    logits: Logits,
    targets: Tensor,
    transform: LogitTransform,
    state: Tensor,
    row_weight: Tensor,
    out: Tensor | None = None,
) -> None:
    shape, chosen = tile(logits, None, state), pointer(targets, CPU, torch.int64)
    described = options(Rule(transform=transform))
    _library().opsd_log_prob_gradient(shape, chosen, _floats(row_weight), described)
    _move(logits, row_weight, out)
