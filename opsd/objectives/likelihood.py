"""The loss that GRPO and SFT share: −Σ w_n log p(y_n), over one context a sample."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from opsd.config import LossSection
from opsd.hidden import rollout_hidden_states
from opsd.models import head, head_arguments
from opsd.objectives.base import Sample, Totals, targets, token_weights
from opsd_kernels import linear_log_prob


def weighted_likelihood(
    model: PreTrainedModel, samples: Sequence[Sample], totals: Totals, section: LossSection
) -> Tensor:
    """−Σ w_n log p(y_n | context, y_<n), a scalar; the student's entropy is added to `totals`."""
    hidden = rollout_hidden_states(model, [s.roles[0] for s in samples])
    weight, bias = head(model)
    result = linear_log_prob(
        hidden,
        weight,
        targets(samples, hidden.device),
        bias=bias,
        memory_budget=section.memory_budget,
        backend=section.backend,
        **head_arguments(model),
    )
    totals.add(len(hidden), student_entropy=result.entropy.mean().item())
    return -(token_weights(samples, hidden.device) * result.log_prob).sum()
