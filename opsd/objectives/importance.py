"""Rollouts that another engine has sampled: each token weighted by how much likelier the student
makes it.

An engine with the student's weights computes with other kernels, in another order and precision,
and so samples from a distribution that differs a little from the one that is trained. A token's
weight is multiplied by min(p_student / p_engine, bound), detached: truncated importance sampling
(Ionides 2008), token by token. Both probabilities are at temperature 1 and over the whole
vocabulary: what is corrected is the engines' difference, not what temperature, top-p and top-k do
on purpose.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd.models import as_operands, head, head_arguments
from opsd.objectives.base import Sample, targets
from opsd_kernels import linear_log_prob


def importance(
    samples: Sequence[Sample], log_prob: Tensor, bound: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The factor of each rollout token [Σ R], and what is logged of them.

    log_prob [Σ R]: the student's, at temperature 1. `engine_divergence` is the mean of
    log p_engine - log p_student: an estimate of KL(engine ‖ student) where tokens were drawn at
    temperature 1.
    """
    engine = [value for sample in samples for value in sample.log_probs]
    difference = log_prob.detach() - torch.tensor(engine, device=log_prob.device)
    ratio = difference.exp()
    return ratio.clamp(max=bound), {
        "importance_ratio": ratio.mean(),
        "importance_truncated_fraction": (ratio > bound).float().mean(),
        "engine_divergence": -difference.mean(),
    }


@torch.no_grad()
def student_log_prob(
    model: PreTrainedModel,
    hidden: Tensor,
    samples: Sequence[Sample],
    *,
    memory_budget: int | None,
    backend: str,
) -> Tensor:
    """log p of each rollout token [Σ R] from the hidden states [Σ R, D] that predict them."""
    weight, bias = head(model)
    hidden, weight, bias = as_operands((hidden, weight, bias))
    return linear_log_prob(
        hidden,
        weight,
        targets(samples, hidden.device),
        bias=bias,
        memory_budget=memory_budget,
        backend=backend,
        **head_arguments(model),
    ).log_prob


def has_ratios(samples: Sequence[Sample], bound: float | None) -> bool:
    """Whether the samples' weights are to be corrected."""
    return bound is not None and all(sample.log_probs is not None for sample in samples)
