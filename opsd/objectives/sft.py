"""SFT on solutions: the mean of -log p(y_n) over the tokens of the target text.

With `loss.roles: [student, teacher]` the same target follows both contexts. This is the cold start:
it teaches a model both prompts before OPSD begins.
"""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from opsd.common.step_timer import phase
from opsd.config.loss import LossSection
from opsd.data.prompts import Prompts
from opsd.objectives.groups import (
    Problem,
    Sample,
    SampleGroup,
    Totals,
    as_student,
    counted_mean,
    counted_tokens,
    samples_of,
    token_weights,
)
from opsd.objectives.log_probs import token_log_prob
from opsd.objectives.token_weights import TokenWeighting
from opsd.prefix import rollout_hidden_states
from opsd.rollout import Rollout


class SFT:
    """Cross-entropy; the weight of each token is 1 ÷ the step's tokens."""

    samples_rollouts = False
    sampling = None
    teacher_role = "teacher"  # it scores nothing here, but it colours the report's completions

    def __init__(
        self, section: LossSection, prompts: Prompts, weighting: TokenWeighting | None = None
    ):
        self.section, self.prompts = section, prompts
        self.weighting = weighting or TokenWeighting(section)

    def sample_groups(
        self, problems: Sequence[Problem], step: int = 0
    ) -> tuple[list[SampleGroup], dict[str, float]]:
        """The target text of each row, after the context of each of `loss.roles`."""
        sequences = [
            (getattr(p.context, role), self.prompts.target(p.row, role))
            for p in problems
            for role in self.section.roles
        ]
        texts = [Rollout(target, True) for _, target in sequences]
        weights = self.weighting(texts, [None] * len(texts))
        return [
            SampleGroup(context, [Sample(target, *weight)])
            for (context, target), weight in zip(sequences, weights, strict=True)
        ], {}

    def loss(
        self,
        model: PreTrainedModel,
        groups: Sequence[SampleGroup],
        totals: Totals,
        share: bool = True,
    ) -> Tensor:
        """See `Objective.loss`; adds the student's entropy to `totals`."""
        samples = samples_of(groups)
        with phase("student"):
            hidden = rollout_hidden_states(model, as_student(groups), share)
        result = token_log_prob(model, hidden, samples, self.section)
        weights, count = token_weights(samples, hidden.device), counted_tokens(samples)
        totals.add(count, student_entropy=counted_mean(result.entropy, weights, count))
        return -(weights * result.log_prob).sum()
