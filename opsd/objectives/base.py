"""What the methods share: a problem with its rollouts, the samples made of it, the step's means."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd.data import Row
from opsd.hidden import Scored
from opsd.prompts import Context
from opsd.rollout import Rollout


@dataclass(frozen=True)
class Problem:
    """A row, its contexts, and the rollouts that the student wrote for it (none under SFT)."""

    row: Row
    context: Context
    rollouts: list[Rollout]


@dataclass(frozen=True)
class Sample:
    """One sequence to learn from: the roles it is scored in, and the weight of its tokens.

    For `opsd` the roles are (student, teacher); for `grpo` and `sft` the one context trained on.
    Weights are divided by the step's tokens already, so that the step's loss is the plain sum over
    micro-batches however the samples are split.
    """

    roles: tuple[Scored, ...]
    weight: float  # of each token; GRPO's may be negative
    log_probs: Sequence[float] | None = None  # the engine's, of each token; see Rollout

    @property
    def tokens(self) -> int:
        """Tokens that are trained on."""
        return len(self.roles[0].rollout)


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

    def samples(self, problems: Sequence[Problem]) -> tuple[list[Sample], dict[str, float]]:
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
    weights = [sample.weight for sample in samples for _ in range(sample.tokens)]
    return torch.tensor(weights, dtype=torch.float32, device=device)


def targets(samples: Sequence[Sample], device: torch.device) -> Tensor:
    """The rollouts' tokens, in the samples' order: [Σ R], int64."""
    ids = [token for sample in samples for token in sample.roles[0].rollout]
    return torch.tensor(ids, device=device)
