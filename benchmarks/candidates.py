"""Who is measured: each candidate is a function that runs forward and backward of one problem once.

It returns (loss, gradient of the hidden states, gradient of the head or None). Backward is called
on the mean over tokens of the divergence.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_kernels import Divergence, linear_divergence, reference

Result = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Problem:
    """hidden states [N, D] of both roles, one head [V, D] for both."""

    student: Tensor
    teacher: Tensor
    weight: Tensor
    divergence: str
    trainable: bool

    @classmethod
    def make(cls, n: int, v: int, d: int, divergence: str, trainable: bool) -> "Problem":
        torch.manual_seed(0)
        student = torch.randn(n, d)
        teacher = student + 0.5 * torch.randn(n, d)
        return cls(student, teacher, torch.randn(v, d) * (2 / d**0.5), divergence, trainable)

    def fresh(self) -> tuple[Tensor, Tensor]:
        """Student hidden states and head as new leaves of autograd."""
        student = self.student.detach().requires_grad_()
        return student, self.weight.detach().requires_grad_(self.trainable)


def ours(problem: Problem) -> Result:
    student, weight = problem.fresh()
    loss = linear_divergence(student, problem.teacher, weight, divergence=problem.divergence).loss
    loss.backward()
    return loss.detach(), student.grad, weight.grad


def dense(problem: Problem) -> Result:
    """Dense autograd: every logit in memory."""
    student, weight = problem.fresh()
    loss = reference.linear_divergence(
        student, problem.teacher, weight, divergence=Divergence(problem.divergence)
    )
    loss.backward()
    return loss.detach(), student.grad, weight.grad


def trl(problem: Problem) -> Result:
    """TRL's chunked divergence, which numbers the divergences: 0 forward KL, 1 reverse KL."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, weight = problem.fresh()
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[problem.divergence]
    per_token, _ = ChunkedDivergenceFunction.apply(
        student, weight, None, problem.teacher, weight.detach(), None, beta
    )
    loss = per_token.mean()
    loss.backward()
    return loss.detach(), student.grad, weight.grad


def gemms(problem: Problem) -> None:
    """The matrix products that an exact algorithm cannot avoid: what is above them is ours."""
    n, (v, _) = len(problem.student), problem.weight.shape
    logits = torch.empty(n, v)
    torch.mm(problem.teacher, problem.weight.T, out=logits)
    torch.mm(problem.student, problem.weight.T, out=logits)
    torch.mm(logits, problem.weight)
    if problem.trainable:
        torch.mm(logits.T, problem.student)


def peers() -> tuple[dict[str, Callable[[Problem], Result]], dict[str, str]]:
    """(installed candidates, missing ones with the reason)."""
    found, missing = {"ours": ours, "dense": dense}, {}
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # noqa: F401
    except ImportError as error:
        missing["trl"] = f"not installed or too old: {error}"
    else:
        found["trl"] = trl
    return found, missing
