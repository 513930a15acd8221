"""Log-probabilities of the samples' tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd.common.step_timer import phase
from opsd.config.loss import LossSection
from opsd.models.dropout import switch_off_dropout
from opsd.models.head import as_operands, head, head_arguments
from opsd.objectives.groups import Sample, SampleGroup, as_student, samples_of, targets
from opsd.objectives.sampling_distribution import SampledLogProb, sampled_log_prob
from opsd.prefix import rollout_hidden_states
from opsd.rollout import Sampling


def token_log_prob(
    model: PreTrainedModel,
    hidden: Tensor,
    samples: Sequence[Sample],
    section: LossSection,
    vocabulary: int | None = None,
    sampling: Sampling | None = None,
) -> SampledLogProb:
    """log p and entropy of each rollout token [Σ R], from the states [Σ R, D] that predict them.

    vocabulary: how many rows of the head count, since a teacher's head may be padded further.
    sampling: how tokens were drawn, so that p is the distribution that they were drawn from; None:
        the model's own, at temperature 1.
    """
    weight, bias = (None if t is None else t[:vocabulary] for t in head(model))
    hidden, weight, bias = as_operands((hidden, weight, bias))
    with phase("loss"):
        return sampled_log_prob(
            hidden,
            weight,
            targets(samples, hidden.device),
            sampling,
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
    sampling: Sampling | None = None,
) -> Tensor:
    """log p of each rollout token [Σ R] by `model`, in the student's contexts, without dropout."""
    switch_off_dropout(model)
    with phase("teacher"):
        hidden = rollout_hidden_states(model, as_student(groups), share)
    samples = samples_of(groups)
    return token_log_prob(model, hidden, samples, section, vocabulary, sampling).log_prob


@torch.no_grad()
def engine_log_prob(
    model: PreTrainedModel,
    hidden: Tensor,
    samples: Sequence[Sample],
    section: LossSection,
    sampling: Sampling | None,
    old: Tensor,
) -> Tensor:
    """log p [Σ R] as engines give theirs: at temperature 1, over the whole vocabulary.

    old: log p of the student before the step, under `sampling`. Where that is another distribution,
    the student as it is now stands in: the two differ after a step's first update alone.
    """
    plain = sampling is None or sampling.draws_from_the_model
    if plain or any(sample.sampling_log_probs is None for sample in samples):
        return old
    return token_log_prob(model, hidden, samples, section).log_prob
