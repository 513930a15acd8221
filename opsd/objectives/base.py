"""What a training step's methods share.

A step's `Batch` holds rollouts with their weights already divided by the step's total, so that
the loss of the step is the plain sum over micro-batches, however the tokens are split.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd.hidden import Scored


@dataclass(frozen=True)
class Sample:
    """One sequence to learn from: the roles it is scored in, and the weight of its tokens.

    For `opsd` the roles are (student, teacher); for `grpo` and `sft` the one context trained on.
    """

    roles: tuple[Scored, ...]
    weight: float  # of each token; advantages may be negative


@dataclass(frozen=True)
class Batch:
    """A step's samples; `tokens` counts those that are trained on."""

    samples: list[Sample]

    @property
    def tokens(self) -> int:
        """Tokens with a weight other than 0."""
        return sum(len(s.roles[0].rollout) for s in self.samples if s.weight)


@dataclass
class Totals:
    """Sums over a step's tokens, from which the step's means are taken."""

    tokens: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, tokens: int, **means: float) -> None:
        """Add a micro-batch of `tokens` tokens with these means."""
        self.tokens += tokens
        for name, mean in means.items():
            self.sums[name] = self.sums.get(name, 0.0) + mean * tokens

    def means(self) -> dict[str, float]:
        """The means over all tokens added."""
        return {name: total / max(self.tokens, 1) for name, total in self.sums.items()}


class Objective(Protocol):
    """A method: the loss of a micro-batch."""

    def loss(self, model: PreTrainedModel, samples: Sequence[Sample], totals: Totals) -> Tensor:
        """The micro-batch's part of the step's loss (scalar); its measures are added to `totals`."""
        ...


def token_weights(samples: Sequence[Sample], device: torch.device) -> Tensor:
    """The weight of each rollout token, in the samples' order: [Σ R], fp32."""
    weights = torch.tensor([s.weight for s in samples], dtype=torch.float32)
    lengths = torch.tensor([len(s.roles[0].rollout) for s in samples])
    return weights.repeat_interleave(lengths).to(device)


def targets(samples: Sequence[Sample], device: torch.device) -> Tensor:
    """The rollouts' tokens, in the samples' order: [Σ R], int64."""
    return torch.tensor([t for s in samples for t in s.roles[0].rollout], device=device)
