"""Log-probabilities of the samples' tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd.common.step_timer import phase
from opsd.config.loss import LossSection
from opsd.models.head import as_operands, head, head_arguments
from opsd.objectives.groups import Sample, SampleGroup, as_student, samples_of, targets
from opsd.prefix import rollout_hidden_states
from opsd_kernels import LinearLogProb, linear_log_prob


def token_log_prob(
    model: PreTrainedModel,
    hidden: Tensor,
    samples: Sequence[Sample],
    section: LossSection,
    vocabulary: int | None = None,
) -> LinearLogProb:
    """log p and entropy of each rollout token [Σ R], from the states [Σ R, D] that predict them.

    `vocabulary`: how many rows of the head count, since a teacher's head may be padded further.
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
def rollout_log_prob(
    model: PreTrainedModel,
    groups: Sequence[SampleGroup],
    section: LossSection,
    share: bool,
    vocabulary: int | None = None,
) -> Tensor:
    """log p of each rollout token [Σ R] by `model`, in the student's contexts."""
    with phase("teacher"):
        hidden = rollout_hidden_states(model, as_student(groups), share)
    return token_log_prob(model, hidden, samples_of(groups), section, vocabulary).log_prob
