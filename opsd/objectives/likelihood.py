"""The loss that GRPO and SFT share: minus the weighted log-likelihood of the samples' tokens."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from opsd.config import LossSection
from opsd.hidden import rollout_hidden_states
from opsd.models import as_operands, head, head_arguments
from opsd.objectives.base import Sample, Totals, targets, token_weights
from opsd.objectives.importance import has_ratios, importance
from opsd.parts import part
from opsd_kernels import linear_log_prob


class LikelihoodObjective:
    """loss = -Σ w_n log p(y_n | context, y_<n); subclasses say what the samples and weights are."""

    section: LossSection
    teacher_role = "teacher"  # it scores nothing here, but shades the report's completions

    def loss(
        self,
        model: PreTrainedModel,
        samples: Sequence[Sample],
        totals: Totals,
        share: bool = True,
    ) -> Tensor:
        """See `Objective.loss`; adds the student's entropy to `totals`."""
        with part("student"):
            hidden = rollout_hidden_states(model, [sample.roles[0] for sample in samples], share)
        weight, bias = head(model)
        hidden, weight, bias = as_operands((hidden, weight, bias))
        with part("loss"):
            result = linear_log_prob(
                hidden,
                weight,
                targets(samples, hidden.device),
                bias=bias,
                memory_budget=self.section.memory_budget,
                backend=self.section.backend,
                **head_arguments(model),
            )
        weights, measures = token_weights(samples, hidden.device), {}
        bound = self.section.importance_bound
        if has_ratios(samples, bound):
            factors, measures = importance(samples, result.log_prob, bound)
            weights *= factors
        totals.add(len(hidden), student_entropy=result.entropy.mean(), **measures)
        return -(weights * result.log_prob).sum()
