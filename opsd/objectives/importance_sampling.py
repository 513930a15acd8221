"""Importance sampling: weights for rollouts that another distribution sampled than the student's.

There are two reasons for a difference. An engine with the student's weights computes with other
kernels, in another order and precision, so its distribution differs a little from the one that is
trained. And after a step's first update the student is no longer the one that sampled.

A token's weight is multiplied by min(p_student / p_sampled, bound), detached: truncated importance
sampling (Ionides 2008), token by token. Both probabilities are at temperature 1 and over the whole
vocabulary, since the correction is for the difference of the two models, and not for what
temperature, top-p and top-k do on purpose. A policy gradient has a ratio of its own for the
updates, so there the correction is for the engine only.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opsd.objectives.groups import Sample


class Importance(NamedTuple):
    """The factor of each rollout token [Σ R], and what is logged of each token, [Σ R]."""

    factors: Tensor
    logged: dict[str, Tensor]


def importance(samples: Sequence[Sample], log_prob: Tensor, bound: float) -> Importance:
    """Ratios of the student's probabilities to the engine's, or to those of the old student.

    `log_prob`: the student's, at temperature 1, [Σ R]. Where tokens were drawn at temperature 1,
    the mean of `engine_divergence`, log p_engine - log p_student, estimates KL(engine ‖ student).
    """
    by_engine = samples[0].sampling_log_probs is not None
    before = [v for s in samples for v in (s.sampling_log_probs if by_engine else s.old_log_probs)]
    difference = log_prob.detach() - torch.tensor(before, device=log_prob.device)
    ratio = difference.exp()
    logged = {
        "importance_ratio": ratio,
        "importance_truncated_fraction": (ratio > bound).float(),
    }
    if by_engine:
        logged["engine_divergence"] = -difference
    return Importance(ratio.clamp(max=bound), logged)


def engine_importance(
    samples: Sequence[Sample], old: Tensor, bound: float | None
) -> Importance | None:
    """`importance` of the student before the step over the engine; None without an engine."""
    if bound is None or any(sample.sampling_log_probs is None for sample in samples):
        return None
    return importance(samples, old, bound)
