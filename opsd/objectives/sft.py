"""SFT on solutions: the mean of -log p(y_n) over the tokens of the target text.

With `loss.roles: [student, teacher]` the same target follows both contexts: the cold start, which
teaches a model the two prompts before OPSD begins.
"""

from collections.abc import Sequence

from opsd.config import LossSection
from opsd.hidden import Scored
from opsd.objectives.base import Problem, Sample
from opsd.objectives.likelihood import LikelihoodObjective
from opsd.prompts import Prompts


class SFT(LikelihoodObjective):
    """Cross-entropy; the weight of each token is 1 ÷ the step's tokens."""

    samples_rollouts = False

    def __init__(self, section: LossSection, prompts: Prompts):
        self.section, self.prompts = section, prompts

    def samples(self, problems: Sequence[Problem]) -> tuple[list[Sample], dict[str, float]]:
        """The target text of each row, after the context of each of `loss.roles`."""
        sequences = [
            Scored(getattr(p.context, role), self.prompts.target(p.row))
            for p in problems
            for role in self.section.roles
        ]
        weight = 1 / sum(len(sequence.rollout) for sequence in sequences)
        return [Sample((sequence,), weight) for sequence in sequences], {}
