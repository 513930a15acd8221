"""Log-probabilities of the samples' tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd.common.step_timer import phase
from opsd.config.loss import LossSection
from opsd.models.head import as_operands, head, head_arguments
from opsd.objectives.base import Sample, targets
from opsd.prefix.rollout_states import rollout_hidden_states
from opsd_kernels import LinearLogProb, linear_log_prob


def token_log_prob(
    model: PreTrainedModel,
    hidden: Tensor,
    samples: Sequence[Sample],
    section: LossSection,
    vocabulary: int | None = None,
) -> LinearLogProb:
    """log p and entropy of each rollout token [Σ R], of the states [Σ R, D] that predict them.

    `vocabulary`: how many rows of the head count; a teacher's may be padded further.
    """
    weight, bias = (None if t is None else t[:vocabulary] for t in head(model))
    hidden, weight, bias = as_operands((hidden, weight, bias))
    with phase("loss"):
        return linear_log_prob(
            hidden,
            weight,
            targets(samples, hidden.device),
            bias=bias,
            memory_budget=section.memory_budget,
            backend=section.backend,
            **head_arguments(model),
        )


@torch.no_grad()
def log_prob_as(
    role: int,
    model: PreTrainedModel,
    samples: Sequence[Sample],
    section: LossSection,
    share: bool,
    vocabulary: int | None = None,
) -> Tensor:
    """log p of each rollout token [Σ R] by `model`, in the samples' role of that number."""
    with phase("teacher"):
        hidden = rollout_hidden_states(model, [sample.roles[role] for sample in samples], share)
    return token_log_prob(model, hidden, samples, section, vocabulary).log_prob
