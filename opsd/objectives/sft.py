"""SFT on solutions: the mean of -log p(y_n) over the tokens of the target text.

With `loss.roles: [student, teacher]` the same target follows both contexts. This is the cold start:
it teaches a model both prompts before OPSD begins.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel

from opsd.common.step_timer import phase
from opsd.objectives.groups import (
    MicroBatch,
    Objective,
    Problem,
    Sample,
    SampleGroup,
    TokenLosses,
    as_student,
)
from opsd.objectives.log_probs import token_log_prob
from opsd.prefix import rollout_hidden_states
from opsd.rollout import Rollout


class SFT(Objective):
    """Cross-entropy; the weight of each token is 1 ÷ the step's tokens."""

    samples_rollouts = False

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

    def token_losses(self, model: PreTrainedModel, batch: MicroBatch) -> TokenLosses:
        with phase("student"):
            hidden = rollout_hidden_states(model, as_student(batch.groups), batch.share)
        result = token_log_prob(model, hidden, batch, self.section)
        loss = -(batch.weights * result.log_prob).sum()
        return TokenLosses(loss, {"student_entropy": result.entropy}, {})
