"""What the methods share: a problem with its rollouts, the samples made of it, the step's means."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd.data.prompts import Context
from opsd.data.rows import Row
from opsd.grading.rewards import GradedRollout
from opsd.prefix.rollout_states import Scored
from opsd.rollout import Rollout


@dataclass(frozen=True)
class Problem:
    """A row, its contexts, and the rollouts that the student wrote for it (none under SFT).

    outcomes: of each rollout, where they are graded. teachers: the teacher's context of each
    rollout where it is made of rollouts, None for one that has nothing to be taught; without it
    all have the context's.
    """

    row: Row
    context: Context
    rollouts: list[Rollout]
    outcomes: list[GradedRollout] | None = None
    teachers: list[list[int] | None] | None = None

    def teacher_contexts(self, role: str = "teacher") -> list[list[int] | None]:
        """The context in which a teacher of this role sees each rollout."""
        if role == "teacher" and self.teachers is not None:
            return self.teachers
        return [getattr(self.context, role)] * len(self.rollouts)


@dataclass(frozen=True)
class Sample:
    """One sequence to learn from: the roles it is scored in, and the weight of its tokens.

    For `opsd` the roles are (student, teacher); for `grpo` and `sft` the one context trained on.
    Weights are divided by the step's tokens already, so that the step's loss is the plain sum over
    micro-batches however the samples are split.
    """

    roles: tuple[Scored, ...]
    weight: float  # of each token
    factors: Sequence[float] | None = None  # of each token, beside `weight`; None: 1
    advantage: float = 0.0  # grpo
    credit: float = 0.0  # grpo: how far the teacher shares the advantage out among the tokens
    sampling_log_probs: Sequence[float] | None = None  # the engine's, of each token; see Rollout
    old_log_probs: Sequence[float] | None = None  # the student's, before the step's first update

    @property
    def tokens(self) -> int:
        """Tokens that are run."""
        return len(self.roles[0].rollout)

    @property
    def counted(self) -> int:
        """Tokens that are trained on: those of a weight."""
        if self.factors is None:
            return self.tokens
        return sum(factor != 0 for factor in self.factors)


@dataclass
class Totals:
    """Sums over a step's tokens, from which the step's means are taken."""

    tokens: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, tokens: int, **means: Tensor) -> None:
        """Add a micro-batch of `tokens` tokens with these means, scalars on any device.

        They stay there: reading each would make the CPU wait for a GPU in every micro-batch.
        """
        self.tokens += tokens
        for name, mean in means.items():
            self.sums[name] = self.sums.get(name, 0.0) + mean.detach().double() * tokens

    def numbers(self) -> "Totals":
        """The same on the CPU, to be sent elsewhere."""
        return Totals(self.tokens, {name: total.cpu() for name, total in self.sums.items()})

    def include(self, other: "Totals") -> None:
        """Add another process's."""
        self.tokens += other.tokens
        for name, total in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + total

    def means(self) -> dict[str, float]:
        """The means over all tokens added."""
        return {name: total.item() / self.tokens for name, total in self.sums.items()}


class Objective(Protocol):
    """A method."""

    samples_rollouts: bool  # False: the method learns from given text
    teacher_role: str  # the context that a teacher sees, "student" or "teacher"

    def samples(
        self, problems: Sequence[Problem], step: int = 0
    ) -> tuple[list[Sample], dict[str, float]]:
        """A step's problems → what to learn from, and measures of the rollouts for the log."""
        ...

    def loss(
        self,
        model: PreTrainedModel,
        samples: Sequence[Sample],
        totals: Totals,
        share: bool = True,
    ) -> Tensor:
        """A micro-batch's part of the step's loss (scalar); adds its measures to `totals`.

        `share`: run each context that neighbouring samples have in common once.
        """
        ...


def token_weights(samples: Sequence[Sample], device: torch.device) -> Tensor:
    """The weight of each rollout token, in the samples' order: [Σ R], fp32."""
    weights = spread([sample.weight for sample in samples], samples, device)
    if any(sample.factors is not None for sample in samples):
        factors = (s.factors if s.factors is not None else [1.0] * s.tokens for s in samples)
        weights *= torch.tensor([f for own in factors for f in own], device=device)
    return weights


def spread(values: Sequence[float], samples: Sequence[Sample], device: torch.device) -> Tensor:
    """A value a sample, given to each of its tokens: [Σ R], fp32."""
    each = [value for value, s in zip(values, samples, strict=True) for _ in range(s.tokens)]
    return torch.tensor(each, dtype=torch.float32, device=device)


def counted_tokens(samples: Sequence[Sample]) -> int:
    """Tokens of a weight, in all samples; 1 at least, to divide by."""
    return max(1, sum(sample.counted for sample in samples))


def counted_mean(values: Tensor, weights: Tensor, count: int) -> Tensor:
    """The mean of `values` [N] over the `count` tokens of a weight."""
    return torch.where(weights != 0, values.detach(), 0.0).sum() / count


def targets(samples: Sequence[Sample], device: torch.device) -> Tensor:
    """The rollouts' tokens, in the samples' order: [Σ R], int64."""
    ids = [token for sample in samples for token in sample.roles[0].rollout]
    return torch.tensor(ids, device=device)


def old_log_prob(samples: Sequence[Sample], now: Tensor) -> Tensor:
    """log p of each token before the step's first update: [Σ R]; `now`'s where it is the first."""
    if all(sample.old_log_probs is None for sample in samples):
        return now.detach()
    return torch.tensor([value for s in samples for value in s.old_log_probs], device=now.device)
