"""On-policy self-distillation: the student's rollout, scored token by token by the teacher.

The student sees the problem, the teacher the problem and a solution. At each rollout token n the
loss is D(p_T(·|n) ‖ p_S(·|n)) over the whole vocabulary; its gradient flows through the student
only. The step's loss is the mean over all its rollout tokens.

With `loss.divergence: sampled_token` it is a policy gradient of the tokens that were sampled, with
the advantage A_n = log p_T(y_n) - log p_S(y_n), p_S before the step's first update: its expectation
there is the gradient of KL(p_S ‖ p_T), from one token instead of the whole vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd.common.step_timer import part
from opsd.config.loss import LossSection
from opsd.models.head import as_operands, head, head_arguments
from opsd.objectives.base import (
    Problem,
    Sample,
    Totals,
    counted_mean,
    counted_tokens,
    old_log_prob,
    targets,
    token_weights,
)
from opsd.objectives.importance_sampling import (
    Importance,
    engine_importance,
    importance,
    were_sampled_otherwise,
)
from opsd.objectives.log_probs import token_log_prob
from opsd.objectives.policy_gradient import surrogate
from opsd.objectives.token_classes import class_parts
from opsd.objectives.token_weights import Weighing
from opsd.prefix.rollout_states import Scored, student_and_teacher
from opsd_kernels import Clip, linear_divergence


class OPSD:
    """The divergence between `teacher` (frozen, or the live model) and the model that trains.

    Args:
        weighing: what the tokens count; none: alike, as `section` has them.
        classes: `class_table`'s; with it, the divergence is logged by class.
    """

    samples_rollouts = True
    teacher_role = "teacher"  # the context that the teacher sees

    def __init__(
        self,
        section: LossSection,
        teacher: PreTrainedModel,
        weighing: Weighing | None = None,
        classes: Tensor | None = None,
    ):
        self.section, self.teacher, self.classes = section, teacher, classes
        self.weighing = weighing or Weighing(section)
        self.clip = None if section.clip == "none" else Clip(section.clip, section.clip_threshold)

    def samples(
        self, problems: Sequence[Problem], step: int = 0
    ) -> tuple[list[Sample], dict[str, float]]:
        """Each rollout after both contexts; those that a teacher says nothing to are left out."""
        seen = [
            (p.context.student, context, rollout, outcome)
            for p in problems
            for context, rollout, outcome in zip(
                p.teacher_contexts(self.teacher_role),
                p.rollouts,
                p.outcomes or [None] * len(p.rollouts),
                strict=True,
            )
        ]
        taught = [item for item in seen if item[1] is not None]
        weights = self.weighing([r for *_, r, _ in taught], [outcome for *_, outcome in taught])
        samples = [
            Sample(
                (Scored(student, rollout.ids), Scored(teacher, rollout.ids)),
                *weight,
                log_probs=rollout.log_probs,
            )
            for (student, teacher, rollout, _), weight in zip(taught, weights, strict=True)
            if weight.of_all
        ]
        used = len(samples) / len(seen)
        return samples, {} if used == 1 else {"trained_fraction": used}

    def loss(
        self,
        model: PreTrainedModel,
        samples: Sequence[Sample],
        totals: Totals,
        share: bool = True,
    ) -> Tensor:
        """See `Objective.loss`."""
        students, teachers = ([sample.roles[role] for sample in samples] for role in (0, 1))
        hidden = student_and_teacher(model, self.teacher, students, teachers, share)
        weights, count = token_weights(samples, model.device), counted_tokens(samples)
        by_token = self.section.divergence == "sampled_token"
        part = self._sampled_token if by_token else self._whole_vocabulary
        loss, logged, fractions = part(model, samples, weights, *hidden)
        if self.classes is not None:
            parts = class_parts(self.classes, targets(samples, model.device), logged["divergence"])
            logged |= {f"divergence_{name}": values for name, values in parts.items()}
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
        """The loss; what is logged of each token [Σ R], and of all of them."""
        ratios = self._importance(model, samples, student)
        if ratios is not None:
            weights = weights * ratios.factors
        (weight, bias), (teacher_weight, teacher_bias) = head(model), head(self.teacher)
        if len(weight) != len(teacher_weight):
            # Padded to different sizes: the rows that both have, which hold all tokens.
            size = min(len(weight), len(teacher_weight))
            weight, teacher_weight = weight[:size], teacher_weight[:size]
            bias = None if bias is None else bias[:size]
            teacher_bias = None if teacher_bias is None else teacher_bias[:size]
        if teacher_weight is weight:
            teacher_weight = teacher_bias = None  # a live teacher: one product serves both
        tensors = (student, teacher, weight, teacher_weight, bias, teacher_bias)
        student, teacher, weight, teacher_weight, bias, teacher_bias = as_operands(tensors)
        with part("loss"):
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
        """How much likelier the student makes each token than whoever sampled it did."""
        if not were_sampled_otherwise(samples, self.section.importance_bound):
            return None
        with torch.no_grad():
            own = token_log_prob(model, student, samples, self.section)
        return importance(samples, own.log_prob, self.section.importance_bound)

    def _sampled_token(
        self,
        model: PreTrainedModel,
        samples: Sequence[Sample],
        weights: Tensor,
        student: Tensor,
        teacher: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """As `_whole_vocabulary`; a token's divergence is its estimate log p_S - log p_T."""
        own = token_log_prob(model, student, samples, self.section)
        with torch.no_grad():
            seen = token_log_prob(self.teacher, teacher, samples, self.section, len(head(model)[0]))
        old = old_log_prob(samples, own.log_prob)
        advantage = seen.log_prob - old
        per_token, clipped = surrogate(own.log_prob, old, advantage, self.section)
        logged = {
            "divergence": -advantage,
            "student_entropy": own.entropy,
            "teacher_entropy": seen.entropy,
            "ratio_clipped_fraction": clipped.float(),
        }
        ratios = engine_importance(samples, old, self.section.importance_bound)
        if ratios is not None:
            logged |= ratios.logged
            weights = weights * ratios.factors
        return (weights * per_token).sum(), logged, {}
