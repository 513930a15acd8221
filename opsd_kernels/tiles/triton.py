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

from opsd_kernels.divergence import DIVERGENCES, Clip, Divergence, LogitTransform
from opsd_kernels.tiles import state as states

TEMPORARIES = 6 / 2048  # each chunk's part of six sums
OLDEST = (3, 6)
# Entries of a chunk, the work of one program: 16 of each role a thread. Fixed, so that a row's sum
# does not depend on the device.
CHUNK, WARPS = 2048, 4


# Whether Triton runs kernels in its interpreter, which serves CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def unusable_because() -> str | None:
    """Of the installation: whether there is a device is seen elsewhere."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run: pip install 'opsd[gpu]'"
    version = importlib.metadata.version("triton")
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        return f"triton {version} is too old: must be at least {'.'.join(map(str, OLDEST))}"
    return None


@functools.cache
def _kernels() -> ModuleType:
    from opsd_kernels.tiles import triton_kernels

    return triton_kernels


def chunk_size(v: int) -> int:
    """How many entries a program works on: a power of two."""
    return min(CHUNK, max(128, _power_of_two(v)))


def _power_of_two(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()


class _Launch:
    """What all kernels on a tile [n, v] share."""

    def __init__(self, tile: Tensor, transform: LogitTransform):
        self.n, self.v = tile.shape
        self.block = chunk_size(self.v)
        self.chunks = -(-self.v // self.block)
        self.tile = tile
        capped = transform.softcap is not None
        cap = transform.softcap if capped else transform.temperature
        self.softcap = {"SOFTCAP": capped}
        self.transform = (transform.scale / cap, cap / transform.temperature)
        # From the gradient by the logit to that by the product.
        self.slope = (transform.temperature / cap, transform.scale / transform.temperature)

    def parts(self, count: int) -> Tensor:
        return self.tile.new_empty((count, self.n, self.chunks))

    def chunkwise(self, kernel, *arguments, **constants) -> None:
        """A program a chunk."""
        self(kernel, (self.n * self.chunks,), *arguments, **constants, BLOCK=self.block)

    def rowwise(self, kernel, parts: Tensor, state: Tensor, count: int) -> None:
        """A program a row and each of `count` sums or roles: their parts go into `state`."""
        arguments = (parts, parts.stride(0), self.chunks, state, state.stride(0))
        self(kernel, (self.n, count), *arguments, BLOCK=_power_of_two(self.chunks), num_warps=1)

    def __call__(self, kernel, grid, *arguments, num_warps: int = WARPS, **constants) -> None:
        if self.n == 0:
            return
        device = self.tile.device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[grid](*arguments, **constants, num_warps=num_warps, enable_fp_fusion=False)


def _numbers(divergence: Divergence, clip: Clip | None) -> tuple[float, float, bool]:
    """(beta, threshold, whether it is the entry clip)."""
    entry_clip = clip is not None and clip.kind == "entry"
    return divergence.beta, clip.threshold if entry_clip else 0.0, entry_clip


def normalisers(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    transform: LogitTransform,
    state: Tensor,
) -> None:
    launch, kernels = _Launch(student, transform), _kernels()
    parts = launch.parts(6)
    launch.chunkwise(
        kernels.normalisers,
        *(student, teacher, bias, teacher_bias, parts, parts.stride(0), launch.v, launch.chunks),
        *(student.stride(0), teacher.stride(0), *launch.transform),
        **launch.softcap,
    )
    launch.rowwise(kernels.merge, parts, state, 2)


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
    launch, kernels = _Launch(student, transform), _kernels()
    beta, threshold, entry_clip = _numbers(divergence, clip)
    parts = launch.parts(5 if entry_clip else 2)
    launch.chunkwise(
        kernels.sums,
        *(student, teacher, bias, teacher_bias, state, state.stride(0)),
        *(parts, parts.stride(0), launch.v, launch.chunks),
        *(student.stride(0), teacher.stride(0), *launch.transform, beta, threshold),
        KIND=DIVERGENCES.index(divergence.name),
        CLIP=entry_clip,
        **launch.softcap,
    )
    launch.rowwise(kernels.add, parts, state[states.DIVERGENCE :], parts.shape[0])


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
    launch, kernels = _Launch(student, transform), _kernels()
    beta, threshold, entry_clip = _numbers(divergence, clip)
    assert sums_known or not entry_clip
    parts = launch.parts(1 if entry_clip else 0 if sums_known else 2)
    launch.chunkwise(
        kernels.gradient,
        *(student, teacher, bias, teacher_bias, state, state.stride(0), _contiguous(row_weight)),
        *(parts, parts.stride(0), launch.v, launch.chunks),
        *(student.stride(0), teacher.stride(0), *launch.transform, *launch.slope),
        *(beta, threshold),
        KIND=DIVERGENCES.index(divergence.name),
        CLIP=entry_clip,
        SUMS_KNOWN=sums_known,
        **launch.softcap,
    )
    if parts.shape[0]:
        first = states.DOT if entry_clip else states.DIVERGENCE
        launch.rowwise(kernels.add, parts, state[first:], parts.shape[0])


def log_prob_normalisers(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    state: Tensor,
) -> None:
    launch, kernels = _Launch(logits, transform), _kernels()
    parts = launch.parts(3)
    launch.chunkwise(
        kernels.normalisers,
        *(logits, None, bias, None, parts, parts.stride(0), launch.v, launch.chunks),
        *(logits.stride(0), 0, *launch.transform),
        **launch.softcap,
    )
    launch.rowwise(kernels.merge, parts, state, 1)
    launch(
        kernels.target,
        (-(-launch.n // 128),),
        *(logits, bias, _contiguous(targets), state[states.TARGET], launch.n, launch.v),
        *(logits.stride(0), *launch.transform),
        **launch.softcap,
        BLOCK=128,
        num_warps=4,
    )


def log_prob_gradient_(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    state: Tensor,
    row_weight: Tensor,
) -> None:
    launch = _Launch(logits, transform)
    launch.chunkwise(
        _kernels().log_prob_gradient,
        *(logits, bias, _contiguous(targets), state, state.stride(0), _contiguous(row_weight)),
        *(launch.v, launch.chunks, logits.stride(0), *launch.transform, *launch.slope),
        **launch.softcap,
    )


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
