"""Tile functions as Triton kernels (`triton_kernels.py`): fp32 tiles on a CUDA device, or on the
CPU under Triton's interpreter. The contract is in `tiles/torch.py`.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from opsd_kernels.divergence import DIVERGENCES, LogitTransform, Rule
from opsd_kernels.tiles import state as states
from opsd_kernels.tiles.logits import Logits

TEMPORARIES = 6 / 2048  # each chunk's six sums
OLDEST = (3, 6)
OLDEST_DEVICE = (7, 0)  # compute capability
# Entries of a chunk, which one program computes: 16 of each role in a thread. The size is fixed, so
# that a row's sum does not depend on the device.
CHUNK, WARPS = 2048, 4
SCALED, SCALING_WARPS = 8192, 8  # entries of a program of `scale`


# Whether Triton runs kernels in its interpreter, which serves CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def unusable_because() -> str | None:
    """What the installation lacks; `resolve` checks whether there is a device."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run: pip install 'opsd-train[gpu]'"
    version = importlib.metadata.version("triton")
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        return f"triton {version} is too old: must be at least {'.'.join(map(str, OLDEST))}"
    return None


@functools.cache
def _kernels() -> ModuleType:
    from opsd_kernels.tiles import triton_kernels

    return triton_kernels


def chunk_size(v: int) -> int:
    """The number of entries for a program: a power of two."""
    return min(CHUNK, max(128, _power_of_two(v)))


def _power_of_two(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()


class _Launch:
    """Arguments that all kernels on a tile [n, v] share, and their launches."""

    def __init__(
        self, logits: Logits, transform: LogitTransform, teacher: LogitTransform | None = None
    ):
        """teacher: the teacher's transform, for kernels of both roles."""
        self.tile = logits.product
        self.n, self.v = self.tile.shape
        self.block = chunk_size(self.v)
        self.chunks = -(-self.v // self.block)
        self.transform: tuple[float | None, ...] = _inner_outer(transform)
        self.softcap = {"SOFTCAP": transform.softcap is not None}
        if teacher is not None:
            self.transform += _inner_outer(teacher)
            self.softcap["TEACHER_SOFTCAP"] = teacher.softcap is not None
        # Factors that convert the gradient by the logit to that by the product.
        self.slope = (1.0 / _outer(transform), transform.scale / transform.temperature)

    def partials(self, count: int) -> Tensor:
        return self.tile.new_empty((count, self.n, self.chunks))

    def chunkwise(self, kernel, *arguments, **constants) -> None:
        """Launch a program for each chunk."""
        self(kernel, (self.n * self.chunks,), *arguments, **constants, BLOCK=self.block)

    def rowwise(self, kernel, partials: Tensor, state: Tensor, count: int) -> None:
        """Launch a program for each row and each of `count` sums or roles, to add partials to
        `state`.
        """
        arguments = (partials, partials.stride(0), self.chunks, state, state.stride(0))
        self(kernel, (self.n, count), *arguments, BLOCK=_power_of_two(self.chunks), num_warps=1)

    def __call__(self, kernel, grid, *arguments, num_warps: int = WARPS, **constants) -> None:
        if self.n == 0:
            return
        device = self.tile.device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[grid](*arguments, **constants, num_warps=num_warps, enable_fp_fusion=False)


def _inner_outer(transform: LogitTransform) -> tuple[float | None, float]:
    """logit = outer tanh(inner (product + bias)), or inner (product + bias); inner None is 1."""
    outer = _outer(transform)
    inner = transform.scale / transform.temperature / outer
    return None if inner == 1.0 else inner, outer


def _outer(transform: LogitTransform) -> float:
    return 1.0 if transform.softcap is None else transform.softcap / transform.temperature


def normalisers(student: Logits, teacher: Logits, rule: Rule, state: Tensor) -> None:
    launch, kernels = _Launch(student, rule.transform, rule.of_teacher), _kernels()
    partials = launch.partials(6)
    launch.chunkwise(
        kernels.normalisers,
        *(*_tensors(student, teacher), partials, partials.stride(0), launch.v, launch.chunks),
        *(*_strides(student, teacher), *launch.transform),
        **launch.softcap,
    )
    launch.rowwise(kernels.merge, partials, state, 2)


def sums(student: Logits, teacher: Logits, rule: Rule, state: Tensor) -> None:
    launch, kernels = _Launch(student, rule.transform, rule.of_teacher), _kernels()
    clips = rule.entry_clip is not None
    partials = launch.partials(5 if clips else 2)
    launch.chunkwise(
        kernels.sums,
        *(*_tensors(student, teacher), state, state.stride(0)),
        *(partials, partials.stride(0), launch.v, launch.chunks),
        *(*_strides(student, teacher), *launch.transform, *_numbers(rule)),
        KIND=_kind(rule),
        CLIP=clips,
        **launch.softcap,
    )
    launch.rowwise(kernels.add, partials, state[states.DIVERGENCE :], partials.shape[0])


def gradient_(
    student: Logits,
    teacher: Logits,
    rule: Rule,
    state: Tensor,
    row_weight: Tensor | None,
    sums_known: bool = True,
    out: Tensor | None = None,
) -> None:
    launch, kernels = _Launch(student, rule.transform, rule.of_teacher), _kernels()
    clips = rule.entry_clip is not None
    assert sums_known or not clips
    partials = launch.partials(1 if clips else 0 if sums_known else 2)
    out = student.product if out is None else out
    launch.chunkwise(
        kernels.gradient,
        *(*_tensors(student, teacher), out, out.stride(0)),
        *(state, state.stride(0), _contiguous(row_weight)),
        *(partials, partials.stride(0), launch.v, launch.chunks),
        *(*_strides(student, teacher), *launch.transform, *launch.slope, *_numbers(rule)),
        KIND=_kind(rule),
        CLIP=clips,
        SUMS_KNOWN=sums_known,
        **launch.softcap,
    )
    if partials.shape[0]:
        first = states.DOT if clips else states.DIVERGENCE
        launch.rowwise(kernels.add, partials, state[first:], partials.shape[0])


def log_prob_normalisers(
    logits: Logits, targets: Tensor, transform: LogitTransform, state: Tensor
) -> None:
    launch, kernels, (product, bias) = _Launch(logits, transform), _kernels(), logits
    partials = launch.partials(3)
    launch.chunkwise(
        kernels.normalisers,
        *(product, None, bias, None, partials, partials.stride(0), launch.v, launch.chunks),
        *(product.stride(0), 0, *launch.transform, *launch.transform),
        **launch.softcap,
        TEACHER_SOFTCAP=False,
    )
    launch.rowwise(kernels.merge, partials, state, 1)
    launch(
        kernels.target,
        (-(-launch.n // 128),),
        *(product, bias, _contiguous(targets), state[states.TARGET], launch.n, launch.v),
        *(product.stride(0), *launch.transform),
        **launch.softcap,
        BLOCK=128,
        num_warps=4,
    )


def log_prob_gradient_(
    logits: Logits,
    targets: Tensor,
    transform: LogitTransform,
    state: Tensor,
    row_weight: Tensor,
    out: Tensor | None = None,
) -> None:
    launch, stride = _Launch(logits, transform), logits.product.stride(0)
    out = logits.product if out is None else out
    launch.chunkwise(
        _kernels().log_prob_gradient,
        *(
            *logits,
            out,
            out.stride(0),
            _contiguous(targets),
            state,
            state.stride(0),
            _contiguous(row_weight),
        ),
        *(launch.v, launch.chunks, stride, *launch.transform, *launch.slope),
        **launch.softcap,
    )


def scale_(x: Tensor, by: Tensor) -> None:
    """x *= by, for a contiguous x and an fp32 scalar on its device, which is not waited for. If it
    is 1, as a loss's own gradient is, x is neither read nor written.
    """
    if x.numel() == 0:
        return
    on_device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    with on_device:
        _kernels().scale[(-(-x.numel() // SCALED),)](
            x, by, x.numel(), BLOCK=SCALED, num_warps=SCALING_WARPS
        )


def _tensors(student: Logits, teacher: Logits) -> tuple[Tensor | None, ...]:
    return student.product, teacher.product, student.bias, teacher.bias


def _strides(student: Logits, teacher: Logits) -> tuple[int, int]:
    return student.product.stride(0), teacher.product.stride(0)


def _kind(rule: Rule) -> int:
    """The divergence's number, or EVEN_JSD's."""
    name, beta = rule.divergence.name, rule.divergence.beta
    return len(DIVERGENCES) if name == "jsd" and beta == 0.5 else DIVERGENCES.index(name)


def _numbers(rule: Rule) -> tuple[float, float]:
    """(beta, threshold of the entry clip)."""
    clip = rule.entry_clip
    return rule.divergence.beta, 0.0 if clip is None else clip.threshold


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
