"""On-policy self-distillation: the student's rollout, scored token by token by the teacher.

The student sees the problem, the teacher the problem and a solution. At each rollout token n the
loss is D(p_T(·|n) ‖ p_S(·|n)) over the whole vocabulary; its gradient flows through the student
only. The step's loss is the mean over all its rollout tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd.config import LossSection
from opsd.hidden import Scored, both_roles_hidden_states, rollout_hidden_states
from opsd.models import as_operands, head, head_arguments
from opsd.objectives.base import Problem, Sample, Totals, token_weights
from opsd.objectives.importance import has_ratios, importance, student_log_prob
from opsd.parts import part
from opsd_kernels import Clip, linear_divergence


class OPSD:
    """The divergence between `teacher` (frozen, or the live model) and the model that trains."""

    samples_rollouts = True
    teacher_role = "teacher"  # the context that the teacher sees

    def __init__(self, section: LossSection, teacher: PreTrainedModel):
        self.section, self.teacher = section, teacher
        self.clip = None if section.clip == "none" else Clip(section.clip, section.clip_threshold)

    def samples(self, problems: Sequence[Problem]) -> tuple[list[Sample], dict[str, float]]:
        """Each rollout after both contexts, all its tokens of weight 1 ÷ the step's tokens."""
        weight = 1 / sum(len(rollout.ids) for p in problems for rollout in p.rollouts)
        samples = [
            Sample(
                (
                    Scored(p.context.student, r.ids),
                    Scored(getattr(p.context, self.teacher_role), r.ids),
                ),
                weight,
                r.log_probs,
            )
            for p in problems
            for r in p.rollouts
        ]
        return samples, {}

    def loss(
        self,
        model: PreTrainedModel,
        samples: Sequence[Sample],
        totals: Totals,
        share: bool = True,
    ) -> Tensor:
        """See `Objective.loss`."""
        student, teacher = self._hidden_states(model, samples, share)
        section, measures = self.section, {}
        weights = token_weights(samples, student.device)
        if has_ratios(samples, section.importance_bound):
            kernel = {"memory_budget": section.memory_budget, "backend": section.backend}
            log_prob = student_log_prob(model, student, samples, **kernel)
            factors, measures = importance(samples, log_prob, section.importance_bound)
            weights *= factors
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
        measures |= {
            "divergence": result.per_token.mean(),
            "student_entropy": result.student_entropy.mean(),
            "teacher_entropy": result.teacher_entropy.mean(),
        }
        if self.clip is not None:
            measures["clipped_fraction"] = result.clipped_fraction
            measures["opposed_fraction"] = result.opposed_fraction
        totals.add(len(student), **measures)
        return result.loss

    def _hidden_states(self, model, samples: Sequence[Sample], share: bool):
        """The student's and the teacher's states that predict the samples' tokens."""
        students, teachers = ([sample.roles[role] for sample in samples] for role in (0, 1))
        if self.teacher is model:
            return both_roles_hidden_states(model, students, teachers, share)
        with torch.no_grad(), part("teacher"):
            teacher = rollout_hidden_states(self.teacher, teachers, share)
        with part("student"):
            return rollout_hidden_states(model, students, share), teacher
