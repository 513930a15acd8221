"""Rollouts that were sampled from another distribution than the student's of now: each token
weighted by how much likelier the student makes it.

Two reasons there are. An engine with the student's weights computes with other kernels, in another
order and precision, and so samples from a distribution that differs a little from the one that is
trained. And after a step's first update the student is no longer the one that sampled.

A token's weight is multiplied by min(p_student / p_sampled, bound), detached: truncated importance
sampling (Ionides 2008), token by token. Both probabilities are at temperature 1 and over the whole
vocabulary: what is corrected is the difference of the two models, not what temperature, top-p and
top-k do on purpose. A policy gradient has a ratio of its own for the updates, and corrects for the
engine alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opsd.objectives.base import Sample


class Importance(NamedTuple):
    """The factor of each rollout token [Σ R], and what is logged of them, [Σ R] each."""

    factors: Tensor
    logged: dict[str, Tensor]


def importance(samples: Sequence[Sample], log_prob: Tensor, bound: float) -> Importance:
    """Of log_prob [Σ R], the student's at temperature 1, over the engine's, or the old student's.

    The mean of `engine_divergence`, log p_engine - log p_student, is an estimate of
    KL(engine ‖ student) where tokens were drawn at temperature 1.
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


def were_sampled_otherwise(samples: Sequence[Sample], bound: float | None) -> bool:
    """Whether the samples' weights are to be corrected."""
    return bound is not None and all(
        s.sampling_log_probs is not None or s.old_log_probs is not None for s in samples
    )


def engine_importance(
    samples: Sequence[Sample], old: Tensor, bound: float | None
) -> Importance | None:
    """`importance` of the student that the step starts with over the engine; None without one."""
    if bound is None or any(sample.sampling_log_probs is None for sample in samples):
        return None
    return importance(samples, old, bound)
