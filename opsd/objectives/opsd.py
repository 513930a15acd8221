"""On-policy self-distillation: the student's rollout, scored token by token by the teacher.

The student sees the problem, the teacher sees the problem and a solution. At each rollout token n
the loss is D(p_T(·|n) ‖ p_S(·|n)) over the whole vocabulary. Its gradient flows through the student
only. The step's loss is the mean over all its rollout tokens.

With `loss.divergence: sampled_token` the loss is a policy gradient of the tokens that were sampled,
with the advantage A_n = log p_T(y_n) - log p_S(y_n), where p_S is the student before the step's
first update. In that update its expectation is the gradient of KL(p_S ‖ p_T), estimated from one
token instead of the whole vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd.common.step_timer import phase
from opsd.config.loss import LossSection
from opsd.models.dropout import switch_off_dropout
from opsd.models.head import as_operands, head, head_arguments
from opsd.objectives.groups import (
    Problem,
    Sample,
    SampleGroup,
    Totals,
    as_student,
    as_teacher,
    counted_mean,
    counted_tokens,
    old_log_prob,
    sample_group,
    samples_of,
    targets,
    token_weights,
)
from opsd.objectives.importance_sampling import (
    Importance,
    engine_importance,
    importance,
)
from opsd.objectives.log_probs import engine_log_prob, token_log_prob
from opsd.objectives.policy_gradient import surrogate
from opsd.objectives.token_classes import split_by_class
from opsd.objectives.token_weights import TokenWeighting
from opsd.prefix import student_and_teacher_states
from opsd.rollout import Sampling
from opsd_kernels import Clip, linear_divergence


class OPSD:
    """The divergence between `teacher` (frozen, or the live model) and the model that trains.

    Args:
        weighting: what the tokens count; None: as `section` says.
        classes: of the vocabulary's entries, by `class_table`; with it, the divergence is logged by
            class.
    """

    samples_rollouts = True
    teacher_role = "teacher"  # the context that the teacher sees

    def __init__(
        self,
        section: LossSection,
        teacher: PreTrainedModel,
        weighting: TokenWeighting | None = None,
        classes: Tensor | None = None,
        sampling: Sampling | None = None,
    ):
        self.section, self.teacher, self.classes = section, teacher, classes
        # Only a policy gradient is one of the policy that sampled.
        self.sampling = sampling if section.divergence == "sampled_token" else None
        self.weighting = weighting or TokenWeighting(section)
        self.clip = None if section.clip == "none" else Clip(section.clip, section.clip_threshold)

    def sample_groups(
        self, problems: Sequence[Problem], step: int = 0
    ) -> tuple[list[SampleGroup], dict[str, float]]:
        """Each rollout in both contexts, without those that have no teacher context."""
        with_context = [
            [
                (rollout, outcome, context)
                for rollout, outcome, context in zip(
                    p.rollouts,
                    p.outcomes or [None] * len(p.rollouts),
                    p.teacher_contexts(self.teacher_role),
                    strict=True,
                )
                if context is not None
            ]
            for p in problems
        ]
        each = [item for items in with_context for item in items]
        weights = iter(self.weighting([r for r, _, _ in each], [o for _, o, _ in each]))
        groups = []
        for p, items in zip(problems, with_context, strict=True):
            pairs = [
                (Sample(r.ids, *weight, sampling_log_probs=r.sampling_log_probs), context)
                for (r, _, context), weight in zip(items, weights, strict=False)
            ]
            if pairs := [pair for pair in pairs if pair[0].weight]:
                groups.append(sample_group(p.context.student, pairs))
        used = len(samples_of(groups)) / sum(len(p.rollouts) for p in problems)
        return groups, {} if used == 1 else {"trained_fraction": used}

    def loss(
        self,
        model: PreTrainedModel,
        groups: Sequence[SampleGroup],
        totals: Totals,
        share: bool = True,
    ) -> Tensor:
        """See `Objective.loss`."""
        switch_off_dropout(model)
        hidden = student_and_teacher_states(
            model, self.teacher, as_student(groups), as_teacher(groups), share
        )
        samples = samples_of(groups)
        weights, count = token_weights(samples, model.device), counted_tokens(samples)
        by_token = self.section.divergence == "sampled_token"
        loss_of = self._sampled_token if by_token else self._whole_vocabulary
        loss, logged, fractions = loss_of(model, samples, weights, *hidden)
        if self.classes is not None:
            by_class = split_by_class(
                self.classes, targets(samples, model.device), logged["divergence"]
            )
            logged |= {f"divergence_{name}": values for name, values in by_class.items()}
        means = {name: counted_mean(values, weights, count) for name, values in logged.items()}
        totals.add(count, **means, **fractions)
        return loss

    def _whole_vocabulary(
        self,
        model: PreTrainedModel,
        samples: Sequence[Sample],
        weights: Tensor,
        student: Tensor,
        teacher: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The loss, what is logged of each token [Σ R], and what is logged of all tokens."""
        ratios = self._importance(model, samples, student)
        if ratios is not None:
            weights = weights * ratios.factors
        (weight, bias), (teacher_weight, teacher_bias) = head(model), head(self.teacher)
        if len(weight) != len(teacher_weight):
            # Padded to different sizes. The rows that both have hold all tokens.
            size = min(len(weight), len(teacher_weight))
            weight, teacher_weight = weight[:size], teacher_weight[:size]
            bias = None if bias is None else bias[:size]
            teacher_bias = None if teacher_bias is None else teacher_bias[:size]
        if teacher_weight is weight:
            teacher_weight = teacher_bias = None  # a live teacher: one product for both
        tensors = (student, teacher, weight, teacher_weight, bias, teacher_bias)
        student, teacher, weight, teacher_weight, bias, teacher_bias = as_operands(tensors)
        with phase("loss"):
            result = linear_divergence(
                student,
                teacher,
                weight,
                teacher_weight,
                bias=bias,
                teacher_bias=teacher_bias,
                divergence=self.section.divergence,
                beta=self.section.beta,
                temperature=self.section.temperature,
                token_weight=weights,
                clip=self.clip,
                reduction="sum",
                memory_budget=self.section.memory_budget,
                backend=self.section.backend,
                **head_arguments(model),
            )
        logged = {
            "divergence": result.per_token,
            "student_entropy": result.student_entropy,
            "teacher_entropy": result.teacher_entropy,
        }
        if ratios is not None:
            logged |= ratios.logged
        fractions = {}
        if self.clip is not None:
            fractions["clipped_fraction"] = result.clipped_fraction
            fractions["inverted_gradient_fraction"] = result.inverted_gradient_fraction
        return result.loss, logged, fractions

    def _importance(
        self, model: PreTrainedModel, samples: Sequence[Sample], student: Tensor
    ) -> Importance | None:
        """The correction for rollouts of another distribution; None where there is none."""
        bound = self.section.importance_bound
        logged = (s.sampling_log_probs is not None or s.old_log_probs is not None for s in samples)
        if bound is None or not all(logged):
            return None
        with torch.no_grad():
            own = token_log_prob(model, student, samples, self.section)
        return importance(samples, own.log_prob, bound)

    def _sampled_token(
        self,
        model: PreTrainedModel,
        samples: Sequence[Sample],
        weights: Tensor,
        student: Tensor,
        teacher: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """As `_whole_vocabulary`. A token's divergence is estimated as log p_S - log p_T."""
        section, sampling = self.section, self.sampling
        own = token_log_prob(model, student, samples, section, sampling=sampling)
        with torch.no_grad():
            size = len(head(model)[0])
            its = token_log_prob(self.teacher, teacher, samples, section, size, sampling)
        old = old_log_prob(samples, own.log_prob)
        advantage = its.log_prob - old
        per_token, clipped = surrogate(own.log_prob, old, advantage, self.section)
        logged = {
            "divergence": -advantage,
            "student_entropy": own.entropy,
            "teacher_entropy": its.entropy,
            "ratio_clipped_fraction": clipped.float(),
        }
        ours = engine_log_prob(model, student, samples, section, sampling, old)
        ratios = engine_importance(samples, ours, section.importance_bound)
        if ratios is not None:
            logged |= ratios.logged
            weights = weights * ratios.factors
        return (weights * per_token).sum(), logged, {}
