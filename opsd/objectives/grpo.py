"""GRPO: a rollout's advantage is its reward against its group's mean.

The loss is the clipped surrogate of `policy_gradient.py`, plus `loss.kl` times an estimate of the
KL to a reference that sees what the student sees. Groups whose rewards are all equal carry no
signal and, without a KL, cost no forward pass. By configuration (docs/methods.md) this is the first
GRPO (arXiv 2402.03300), DAPO (2503.14476), Dr. GRPO (2503.20783), and with `loss.credit` RLSD
(2604.03128).
"""

from collections.abc import Sequence

from transformers import PreTrainedModel

from opsd.common.step_timer import phase
from opsd.config.loss import LossSection
from opsd.models.head import head, mixed
from opsd.objectives.groups import (
    MicroBatch,
    Objective,
    Problem,
    Sample,
    SampleGroup,
    TokenLosses,
    as_student,
    as_teacher,
    sample_group,
)
from opsd.objectives.importance_sampling import corrected_for_engine
from opsd.objectives.log_probs import rollout_log_prob, token_log_prob
from opsd.objectives.policy_gradient import k3, surrogate, teacher_credit
from opsd.prefix import rollout_hidden_states, student_and_teacher_states


class GRPO(Objective):
    """Policy gradient with the group's rewards."""

    def sample_groups(
        self, problems: Sequence[Problem], step: int = 0
    ) -> tuple[list[SampleGroup], dict[str, float]]:
        """Every rollout of a group whose rewards differ; with `loss.kl`, every rollout."""
        credit = credit_share(self.section, step)
        rollouts = [rollout for p in problems for rollout in p.rollouts]
        outcomes = [outcome for p in problems for outcome in p.outcomes]
        weights = iter(self.weighting(rollouts, outcomes))
        groups, informative = [], 0
        for p in problems:
            rewards = [outcome.reward for outcome in p.outcomes]
            advantages = group_advantages(rewards, self.section.scale_advantages)
            informative += any(advantages)
            pairs = []
            for rollout, advantage, context in zip(
                p.rollouts, advantages, p.teacher_contexts(), strict=True
            ):
                weight = next(weights)
                if weight.of_all and (advantage or self.section.kl):
                    sample = Sample(
                        rollout.ids,
                        *weight,
                        advantage=advantage,
                        credit=credit,
                        sampling_log_probs=rollout.sampling_log_probs,
                    )
                    # Without a teacher context the teacher sees the student's: the evidence is 1
                    # where both have the same weights.
                    pairs.append((sample, [p.context.student if context is None else context]))
            if pairs and self.section.credit:
                groups.append(sample_group(p.context.student, pairs))
            elif pairs:
                groups.append(SampleGroup(p.context.student, [sample for sample, _ in pairs]))
        return groups, {"informative_groups": informative / len(problems)}

    def token_losses(self, model: PreTrainedModel, batch: MicroBatch) -> TokenLosses:
        section, sampling, groups = self.section, self.sampling, batch.groups
        students = as_student(groups)
        if section.credit:
            teachers = [(self.teacher, as_teacher(groups))]
            hidden, states = student_and_teacher_states(model, students, teachers, batch.share)
        else:
            with phase("student"):
                hidden = rollout_hidden_states(model, students, batch.share)
        own = token_log_prob(model, hidden, batch, section, sampling)
        old, vocabulary = batch.old_log_prob(own.log_prob), len(head(model)[0])
        advantage = of_rollout = batch.spread([sample.advantage for sample in batch.samples])
        logged = {"student_entropy": own.entropy}
        if section.credit:
            _, *own_head = mixed([self.teacher], states, [1.0], vocabulary)
            by_teacher = token_log_prob(
                self.teacher, states[0], batch, section, sampling, own_head
            ).log_prob.detach()
            credit = batch.spread([sample.credit for sample in batch.samples])
            advantage = teacher_credit(of_rollout, old, by_teacher, credit, section.credit_clip)
            logged["credit_moved"] = (advantage - of_rollout).abs()
        per_token, clipped = surrogate(own.log_prob, old, advantage, section)
        logged["ratio_clipped_fraction"] = clipped.float()
        if section.kl:
            reference = rollout_log_prob(
                self.teacher, groups, section, batch.share, sampling, vocabulary
            )
            logged["reference_divergence"] = divergence = k3(own.log_prob, reference)
            per_token = per_token + section.kl * divergence
        weights, corrections = corrected_for_engine(model, hidden, batch, section, sampling, old)
        return TokenLosses((weights * per_token).sum(), logged | corrections, {})


def group_advantages(rewards: Sequence[float], scale: bool) -> list[float]:
    """r - mean of one group's rewards, ÷ their standard deviation if `scale`; 0 if all alike."""
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    deviation = (sum(c * c for c in centred) / len(centred)) ** 0.5
    return [c / deviation for c in centred] if scale else centred


def credit_share(section: LossSection, step: int) -> float:
    """RLSD's λ: `loss.credit`, falling to 0 over `loss.credit_steps`."""
    if section.credit_steps is None:
        return section.credit
    return section.credit * max(0.0, 1 - step / section.credit_steps)
