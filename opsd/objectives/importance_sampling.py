"""Importance sampling: weights for rollouts sampled from another distribution than the student's.

There are two reasons for a difference. An engine with the student's weights uses other kernels,
another order and precision, so its distribution differs a little from the one that is trained. And
after a step's first update the student is no longer the one that sampled.

A token's weight is multiplied by min(p_student / p_sampled, bound), detached: truncated importance
sampling (Ionides 2008), token by token. Both probabilities are at temperature 1 and over the whole
vocabulary: the correction is for the difference of the two models, not for the intended effect of
temperature, top-p and top-k. A policy gradient has its own ratio for the updates, so there the
correction is only for the engine.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd.config.loss import LossSection
from opsd.objectives.groups import MicroBatch
from opsd.objectives.log_probs import token_log_prob
from opsd.rollout import Sampling

Corrected = tuple[Tensor, dict[str, Tensor]]
"""The tokens' weights times their ratios, and values to log for each token: [Σ R]."""


def corrected_for_sampling(
    model: PreTrainedModel, hidden: Tensor, batch: MicroBatch, section: LossSection
) -> Corrected:
    """Correct the weights for the distribution that sampled, if `batch.sampled_by_others`."""
    with torch.no_grad():
        own = token_log_prob(model, hidden, batch, section).log_prob
    return _corrected(batch, own, section.importance_bound)


def corrected_for_engine(
    model: PreTrainedModel,
    hidden: Tensor,
    batch: MicroBatch,
    section: LossSection,
    sampling: Sampling | None,
    old: Tensor,
) -> Corrected:
    """Correct the weights for the engine alone.

    old: log p by the student before the step, under `sampling`. If that is another distribution
    than the engine's (temperature 1, the whole vocabulary), the current student is used instead: it
    differs only after a step's first update.
    """
    by_engine = all(sample.sampling_log_probs is not None for sample in batch.samples)
    if section.importance_bound is None or not by_engine:
        return batch.weights, {}
    if sampling is not None and not sampling.draws_from_the_model:
        with torch.no_grad():
            old = token_log_prob(model, hidden, batch, section).log_prob
    return _corrected(batch, old, section.importance_bound)


def _corrected(batch: MicroBatch, log_prob: Tensor, bound: float) -> Corrected:
    """`log_prob`: the student's, at temperature 1, [Σ R]. If tokens were sampled at temperature 1,
    the mean of `engine_divergence`, log p_engine - log p_student, estimates KL(engine ‖ student).
    """
    samples = batch.samples
    by_engine = samples[0].sampling_log_probs is not None
    before = [v for s in samples for v in (s.sampling_log_probs if by_engine else s.old_log_probs)]
    difference = log_prob.detach() - torch.tensor(before, device=log_prob.device)
    ratio = difference.exp()
    logged = {"importance_ratio": ratio, "importance_truncated_fraction": (ratio > bound).float()}
    if by_engine:
        logged["engine_divergence"] = -difference
    return batch.weights * ratio.clamp(max=bound), logged
