"""SFT on solutions: the mean of -log p(y_n) over the tokens of the target text.

With `loss.roles: [student, teacher]` the same target follows both contexts: the cold start, which
teaches a model the two prompts before OPSD begins.
"""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from opsd.common.step_timer import phase
from opsd.config.loss import LossSection
from opsd.data.prompts import Prompts
from opsd.objectives.base import (
    Problem,
    Sample,
    Totals,
    counted_mean,
    counted_tokens,
    token_weights,
)
from opsd.objectives.log_probs import token_log_prob
from opsd.objectives.token_weights import TokenWeighting
from opsd.prefix.rollout_states import Scored, rollout_hidden_states
from opsd.rollout import Rollout


class SFT:
    """Cross-entropy; the weight of each token is 1 ÷ the step's tokens."""

    samples_rollouts = False
    teacher_role = "teacher"  # it scores nothing here, but shades the report's completions

    def __init__(
        self, section: LossSection, prompts: Prompts, weighting: TokenWeighting | None = None
    ):
        self.section, self.prompts = section, prompts
        self.weighting = weighting or TokenWeighting(section)

    def samples(
        self, problems: Sequence[Problem], step: int = 0
    ) -> tuple[list[Sample], dict[str, float]]:
        """The target text of each row, after the context of each of `loss.roles`."""
        sequences = [
            Scored(getattr(p.context, role), self.prompts.target(p.row, role))
            for p in problems
            for role in self.section.roles
        ]
        texts = [Rollout(list(sequence.rollout), True) for sequence in sequences]
        weights = self.weighting(texts, [None] * len(texts))
        return [
            Sample((sequence,), *weight)
            for sequence, weight in zip(sequences, weights, strict=True)
        ], {}

    def loss(
        self,
        model: PreTrainedModel,
        samples: Sequence[Sample],
        totals: Totals,
        share: bool = True,
    ) -> Tensor:
        """See `Objective.loss`; adds the student's entropy to `totals`."""
        with phase("student"):
            hidden = rollout_hidden_states(model, [sample.roles[0] for sample in samples], share)
        result = token_log_prob(model, hidden, samples, self.section)
        weights, count = token_weights(samples, hidden.device), counted_tokens(samples)
        totals.add(count, student_entropy=counted_mean(result.entropy, weights, count))
        return -(weights * result.log_prob).sum()
