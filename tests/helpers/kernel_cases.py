"""Cases for the kernel tests, and the three-way comparison: fused, plain torch in the same dtype,
and the dense reference in fp64, which counts as exact.
"""

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from opsd_kernels import Clip, Divergence, LogitTransform, linear_divergence, reference

CPU_BACKENDS = ("torch", "cpp")


class OnGpu(str):
    """The name of a backend, for tests with tensors on a GPU (tests/kernels/conftest.py)."""


on_gpu = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.device_count(), reason="no CUDA device"),
)
GPU_BACKENDS = tuple(
    pytest.param(OnGpu(name), id=f"{name} on a GPU", marks=on_gpu)
    for name in ("torch", "triton", "cuda")
)
# All backends on the devices that they support, with the same cases.
BACKENDS = (*CPU_BACKENDS, *GPU_BACKENDS)
DEVICES = ("cpu", pytest.param("cuda", marks=on_gpu))
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
# By the names that `make` takes: the compiled backends compute beta 1/2 by a formula of its own.
KINDS = {name: Divergence(name, 0.3) for name in DIVERGENCES}
KINDS["even_jsd"] = Divergence("jsd", 0.5)
# One token and a vocabulary that no vector length divides; just over one vector; more tokens than a
# block and a vocabulary just over a power of two; several blocks of 512 entries.
SHAPES = ((1, 17, 8), (5, 33, 16), (130, 2051, 32), (7, 1025, 24))
# The largest relative errors against fp64 (values, gradients), whatever plain torch has.
LIMITS = {
    torch.float64: (1e-9, 1e-8),
    torch.float32: (2e-4, 2e-4),
    torch.bfloat16: (3e-2, 3e-2),
    torch.float16: (3e-2, 3e-2),
}


@dataclass(frozen=True)
class Case:
    """The tensors and options of one call."""

    student: Tensor
    teacher: Tensor
    weight: Tensor
    teacher_weight: Tensor | None = None
    bias: Tensor | None = None
    token_weight: Tensor | None = None
    divergence: str = "forward_kl"
    beta: float = 0.3
    transform: LogitTransform = field(default_factory=LogitTransform)
    teacher_transform: LogitTransform | None = None
    clip: Clip | None = None
    reduction: str = "mean"
    budget: int | None = None
    frozen: bool = False  # whether the head is frozen

    def to(self, dtype: torch.dtype) -> "Case":
        names = ("student", "teacher", "weight", "teacher_weight", "bias", "token_weight")
        tensors = {n: getattr(self, n) for n in names}
        return replace(self, **{n: x if x is None else x.to(dtype) for n, x in tensors.items()})

    def trainable(self) -> list[Tensor]:
        tensors = (self.student,) if self.frozen else (self.student, self.weight, self.bias)
        return [x for x in tensors if x is not None]

    def require_grad(self) -> "Case":
        names = ("student",) if self.frozen else ("student", "weight", "bias")
        fresh = {n: getattr(self, n) for n in names}
        return replace(
            self,
            **{n: x if x is None else x.detach().requires_grad_() for n, x in fresh.items()},
        )

    def fused(self, backend: str, **more):
        return linear_divergence(
            self.student,
            self.teacher,
            self.weight,
            self.teacher_weight,
            bias=self.bias,
            divergence=self.divergence,
            beta=self.beta,
            temperature=self.transform.temperature,
            logit_scale=self.transform.scale,
            logit_softcap=self.transform.softcap,
            token_weight=self.token_weight,
            clip=self.clip,
            reduction=self.reduction,
            memory_budget=self.budget,
            backend=backend,
            teacher_transform=self.teacher_transform,
            **more,
        )

    def dense(self) -> Tensor:
        return reference.linear_divergence(
            self.student,
            self.teacher,
            self.weight,
            self.teacher_weight,
            bias=self.bias,
            divergence=Divergence(self.divergence, self.beta),
            transform=self.transform,
            token_weight=self.token_weight,
            clip=self.clip,
            reduction=self.reduction,
            teacher_transform=self.teacher_transform,
        )


def make(n: int, v: int, d: int, *, bias: bool = False, **options) -> Case:
    """Roles that differ like a student and its teacher: nearby hidden states, logits of a few
    units.
    """
    student = torch.randn(n, d)
    kind = KINDS[options.pop("divergence", "forward_kl")]
    options = {"divergence": kind.name, "beta": kind.beta} | options
    return Case(
        student=student,
        teacher=student + 0.5 * torch.randn(n, d),
        weight=torch.randn(v, d) * (2.0 / d**0.5),
        bias=torch.randn(v) if bias else None,
        **options,
    )


def relative_error(x: Tensor, truth: Tensor) -> float:
    return float((x.detach().double() - truth.detach()).norm() / truth.detach().norm().clamp(1e-12))


def check(
    case: Case, dtype: torch.dtype, backend: str, budgets: tuple[int | None, ...] = ()
) -> None:
    """Check the loss and all gradients of `case` in `dtype`, with a random upstream gradient; with
    each of the memory budgets, or its own.
    """
    low = case.to(dtype)
    upstream = None

    def run(c: Case, loss: Tensor) -> list[Tensor]:
        nonlocal upstream
        if upstream is None:
            upstream = torch.randn(loss.shape, dtype=torch.float64)
        return [loss, *torch.autograd.grad(loss, c.trainable(), upstream.to(loss.dtype))]

    truth, plain = low.to(torch.float64).require_grad(), low.require_grad()
    exact, by_torch = run(truth, truth.dense()), run(plain, plain.dense())
    value, gradient = LIMITS[dtype]
    limits = (value, gradient, gradient, gradient)
    for budget in budgets or (case.budget,):
        fused = replace(low, budget=budget).require_grad()
        found = run(fused, fused.fused(backend).loss)
        for name, limit, want, x, y in zip(
            ("loss", "dh", "dW", "dbias"), limits, exact, by_torch, found, strict=False
        ):
            plain_error, error = relative_error(x, want), relative_error(y, want)
            assert error <= min(limit, plain_error + limit / 10), (
                f"{name}: {error:.2e}, plain torch {plain_error:.2e}, budget {budget}"
            )
