"""Computes each token's weight in the loss, from `loss.weights` and `loss.aggregation`.

    w_in = r_i f_in / Z        r_i = [right or wrong] · [cut]      f_in = position · class

for token n of rollout i. With `aggregation`
- token:    Z = Σ_i r_i Σ_n f_in: the step's loss is the weighted mean over its tokens;
- rollout:  Z_i = (Σ_i r_i) Σ_n f_in: the weighted mean over rollouts of their tokens' mean;
- constant: Z = (number of rollouts) · max_new_tokens: independent of other rollouts' lengths.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opsd.config.loss import LossSection
from opsd.grading.rewards import GradedRollout
from opsd.objectives.token_classes import CLASSES, classes_of
from opsd.rollout import Rollout


class Weight(NamedTuple):
    """A rollout's weight for all its tokens, and a factor for each token if they differ."""

    of_all: float
    factors: tuple[float, ...] | None = None


def balanced(
    weights: Sequence[Weight], taught: Sequence[tuple[str, Rollout]], balance: bool = True
) -> tuple[list[Weight], dict[str, float]]:
    """Scale the weights of rollouts, which come with their teachers' names, so that each of a
    step's K teachers has 1 ÷ K of the total: w → w Σ ÷ (K Σ_k). Also returns the share that each
    had before. balance: False leaves the weights as they are. (Open-MOPD, arXiv 2608.19098.)"""
    sums: dict[str, float] = {}
    for weight, (name, rollout) in zip(weights, taught, strict=True):
        size = len(rollout.ids) if weight.factors is None else sum(weight.factors)
        sums[name] = sums.get(name, 0.0) + weight.of_all * size
    total, count = sum(sums.values()), sum(map(bool, sums.values()))
    shares = {name: own / total if total else 0.0 for name, own in sums.items()}
    if not balance:
        return list(weights), shares
    return [
        weight._replace(of_all=weight.of_all and weight.of_all / (count * shares[name]))
        for weight, (name, _) in zip(weights, taught, strict=True)
    ], shares


class TokenWeighting:
    """Computes the weights of rollouts.

    Args:
        section: `loss`.
        max_new_tokens: rollout.max_new_tokens, for aggregation `constant`.
        classes: the classes of the vocabulary's entries, by `class_table`.
    """

    def __init__(
        self, section: LossSection, max_new_tokens: int = 0, classes: Tensor | None = None
    ):
        self.section, self.max_new_tokens = section, max_new_tokens
        weights = section.weights
        by_class = [getattr(weights, name) for name in CLASSES]
        equal = by_class == [1.0] * len(CLASSES)
        self.by_class, self.classes = torch.tensor(by_class), None if equal else classes
        self.flat = weights.skip_first == 0 and weights.position[0] == weights.position[1] == 1.0

    def __call__(
        self, rollouts: Sequence[Rollout], outcomes: Sequence[GradedRollout | None]
    ) -> list[Weight]:
        """The weights of a step's rollouts. Outcomes may be None if correctness does not count."""
        factors = [self._factors(rollout.ids) for rollout in rollouts]
        sizes = [
            len(rollout.ids) if own is None else sum(own)
            for rollout, own in zip(rollouts, factors, strict=True)
        ]
        of_rollout = [
            self._of_rollout(rollout, outcome) if size else 0.0
            for rollout, outcome, size in zip(rollouts, outcomes, sizes, strict=True)
        ]
        if self.section.aggregation == "rollout":
            total = sum(of_rollout)
            norms = [total * size for size in sizes]
        elif self.section.aggregation == "constant":
            norms = [float(len(rollouts) * self.max_new_tokens)] * len(rollouts)
        else:
            total = sum(r * size for r, size in zip(of_rollout, sizes, strict=True))
            norms = [total] * len(rollouts)
        return [
            Weight(r / norm if r else 0.0, own)
            for r, norm, own in zip(of_rollout, norms, factors, strict=True)
        ]

    def _of_rollout(self, rollout: Rollout, outcome: GradedRollout | None) -> float:
        weights, weight = self.section.weights, 1.0
        if weights.correct != 1.0 or weights.incorrect != 1.0:
            weight = weights.correct if outcome.correct else weights.incorrect
        return weight if rollout.finished else weight * weights.truncated

    def _factors(self, ids: Sequence[int]) -> tuple[float, ...] | None:
        """The factor of each token; None if all are 1."""
        if self.flat and self.classes is None:
            return None
        first, last = self.section.weights.position
        factors = torch.linspace(first, last, len(ids))
        factors[: self.section.weights.skip_first] = 0.0
        if self.classes is not None:
            factors *= self.by_class[classes_of(self.classes, torch.as_tensor(ids)).long()]
        return tuple(factors.tolist())
