"""SFT on solutions: the mean of -log p(y_n) over the tokens of the target text.

With `loss.roles: [student, teacher]` the same target follows both contexts. This is the cold start:
it teaches a model both prompts before OPSD begins. `loss.sft_alpha` adds the same loss, with this
factor, to another method's step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from opsd.config.loss import LossSection
from opsd.objectives.groups import MicroBatch, Objective, Problem, Sample, SampleGroup, TokenLosses
from opsd.objectives.log_probs import token_log_prob
from opsd.rollout import Rollout


class SFT(Objective):
    """Cross-entropy; the weight of each token is 1 ÷ the step's tokens."""

    samples_rollouts = False
    measured = ("student_entropy",)

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

    def token_losses(
        self,
        model: PreTrainedModel,
        batch: MicroBatch,
        student: Tensor,
        teachers: Mapping[str, Sequence[Tensor]],
    ) -> TokenLosses:
        result = token_log_prob(model, student, batch, self.section)
        loss = -(batch.weights * result.log_prob).sum()
        logged = {"student_entropy": result.entropy, "negative_log_prob": -result.log_prob}
        return TokenLosses(loss, {name: logged[name] for name in self.measured}, {})


class Given(SFT):
    """`loss.sft_alpha` times the mean of -log p(y_n) over the tokens of a step's target texts."""

    measured = ("negative_log_prob",)

    def __init__(self, section: LossSection, **more: Any):
        plain = {"backend": section.backend, "memory_budget": section.memory_budget}
        super().__init__(LossSection(**plain), **more)
        self.alpha = section.sft_alpha

    def sample_groups(
        self, problems: Sequence[Problem], step: int = 0
    ) -> tuple[list[SampleGroup], dict[str, float]]:
        """The groups of `SFT`, marked as given; none if the weight is 0."""
        if not self.alpha:
            return [], {}
        groups, measures = super().sample_groups(problems, step)
        # Copy the context, so that these are not pieces of a group of rollouts.
        return [
            replace(
                group,
                student=list(group.student),
                samples=[replace(s, weight=self.alpha * s.weight) for s in group.samples],
                given=True,
            )
            for group in groups
        ], measures
