"""The cases, their tensors, and the true results.

Every task is forward and backward of a mean over tokens: of a divergence, or of the targets'
negative log-probability ("log_prob").
"""

from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from opsd_kernels import Divergence, reference

TASKS = ("forward_kl", "reverse_kl", "jsd", "log_prob")
DTYPES = ("float32", "bfloat16", "float16")


class Result(NamedTuple):
    """The loss, the gradient of the hidden states [N, D], and that of the head [V, D] or None."""

    loss: Tensor
    d_hidden: Tensor
    d_weight: Tensor | None


@dataclass(frozen=True)
class Case:
    """N tokens, V vocabulary, D hidden width; one head for both roles, frozen or trained."""

    tokens: int
    vocabulary: int
    width: int
    dtype: str = "float32"
    task: str = "forward_kl"
    frozen: bool = False

    @property
    def label(self) -> str:
        head = "frozen" if self.frozen else "trainable"
        shape = f"N={self.tokens} V={self.vocabulary} D={self.width}"
        return f"{self.task} {head} {self.dtype} {shape}"

    def json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Problem:
    """A case's tensors: hidden states [N, D] of both roles, head [V, D], target tokens [N]."""

    case: Case
    student: Tensor
    teacher: Tensor
    weight: Tensor
    targets: Tensor

    @classmethod
    def make(cls, case: Case, device: str) -> "Problem":
        """Random tensors, always the same for a case; logits have a standard deviation of 2."""
        torch.manual_seed(0)
        n, v, d = case.tokens, case.vocabulary, case.width
        with torch.device(device):
            student = torch.randn(n, d)
            teacher = student + 0.5 * torch.randn(n, d)
            weight = torch.randn(v, d).mul_(2 / d**0.5)
            targets = torch.randint(v, (n,))
        dtype = getattr(torch, case.dtype)
        return cls(case, student.to(dtype), teacher.to(dtype), weight.to(dtype), targets)

    def first(self, tokens: int) -> "Problem":
        """The same problem with fewer tokens."""
        n = min(tokens, self.case.tokens)
        student, teacher, targets = (x[:n] for x in (self.student, self.teacher, self.targets))
        return Problem(replace(self.case, tokens=n), student, teacher, self.weight, targets)

    def fresh(self) -> tuple[Tensor, Tensor]:
        """The student's hidden states and the head as new autograd leaves."""
        student = self.student.detach().requires_grad_()
        return student, self.weight.detach().requires_grad_(not self.case.frozen)

    def truth(self) -> Result:
        """The result of the dense reference in fp64, from the same tensors, which are already
        rounded.
        """
        student, weight = (x.detach().double().requires_grad_() for x in self.fresh())
        if self.case.task == "log_prob":
            loss = -reference.linear_log_prob(student, weight, self.targets)[0].mean()
        else:
            divergence = Divergence(self.case.task)
            loss = reference.linear_divergence(
                student, self.teacher.double(), weight, divergence=divergence
            )
        loss.backward()
        assert student.grad is not None
        return Result(loss.detach(), student.grad, None if self.case.frozen else weight.grad)
