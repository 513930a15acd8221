"""GRPO: a rollout's advantage is its reward relative to its group's mean.

The loss is the clipped surrogate of `policy_gradient.py`, plus `loss.kl` times an estimate of the
KL to a reference in the student's context. Groups whose rewards are all equal carry no signal and,
without a KL, cost no forward pass. By configuration (docs/methods.md) this is the first GRPO (arXiv
2402.03300), DAPO (2503.14476), Dr. GRPO (2503.20783), and with `loss.credit` RLSD (2604.03128).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd.config.loss import LossSection
from opsd.models.head import Scorer, head
from opsd.objectives.groups import (
    MicroBatch,
    Objective,
    Problem,
    Sample,
    SampleGroup,
    TokenLosses,
    sample_group,
)
from opsd.objectives.importance_sampling import corrected_for_engine
from opsd.objectives.log_probs import (
    SampledLogProb,
    rollout_log_prob,
    token_log_prob,
    whole_temperature,
)
from opsd.objectives.opsd import OPSD
from opsd.objectives.policy_gradient import k3, surrogate, teacher_credit


class GRPO(Objective):
    """Policy gradient with the group's rewards, with `loss.distil` also opsd's divergence."""

    def __init__(self, section: LossSection, *what: Any, **more: Any):
        super().__init__(section, *what, **more)
        self.opsd = OPSD(section, *what, **more)
        self.beside = self.opsd.beside

    def sample_groups(
        self, problems: Sequence[Problem], step: int = 0
    ) -> tuple[list[SampleGroup], dict[str, float]]:
        """All rollouts of groups whose rewards differ or that distil; with `loss.kl` all."""
        section, credit = self.section, credit_share(self.section, step)
        rollouts = [rollout for p in problems for rollout in p.rollouts]
        outcomes = [outcome for p in problems for outcome in p.outcomes]
        weights = iter(self.weighting(rollouts, outcomes))
        groups, informative = [], 0
        for p in problems:
            rewards = [outcome.reward for outcome in p.outcomes]
            advantages = group_advantages(rewards, section.scale_advantages)
            distil = section.distil
            if section.distil_groups == "all_wrong":
                if any(outcome.correct for outcome in p.outcomes):
                    distil = 0.0
                else:
                    advantages = [0.0] * len(rewards)
            informative += any(advantages)
            pairs = []
            for rollout, advantage, contexts in zip(
                p.rollouts, advantages, self.contexts(p), strict=True
            ):
                weight = next(weights)
                distils = 0.0 if contexts is None else distil
                if weight.of_all and (advantage or section.kl or distils):
                    sample = Sample(
                        rollout.ids,
                        *weight,
                        advantage=advantage,
                        credit=credit,
                        distil=distils,
                        sampling_log_probs=rollout.sampling_log_probs,
                    )
                    # Without a teacher context the teacher sees the student's: the evidence is 1
                    # if both have the same weights.
                    pairs.append((sample, contexts or [p.context.student] * len(self.members)))
            if pairs and (section.credit or distil):
                coefficients = self.coefficients(p, step)
                groups.append(sample_group(p.context.student, pairs, coefficients))
            elif pairs:
                groups.append(SampleGroup(p.context.student, [sample for sample, _ in pairs]))
        groups += self.beside.sample_groups(problems)[0]
        return groups, {"informative_groups": informative / len(problems)}

    def token_losses(
        self,
        model: PreTrainedModel,
        batch: MicroBatch,
        hidden: Tensor,
        teachers: Mapping[str, Sequence[Tensor]],
    ) -> TokenLosses:
        section, sampling, groups = self.section, self.sampling, batch.groups
        advantage = of_rollout = batch.spread([sample.advantage for sample in batch.samples])
        reference = None
        if section.kl:
            what = section, batch.share, sampling, len(head(model)[0])
            reference = rollout_log_prob(self.teacher, groups, *what)

        def policy(log_prob: Tensor, rows: Tensor | slice = slice(None)) -> dict[str, Tensor]:
            old = batch.old_log_prob(log_prob, rows)
            loss, clipped = surrogate(log_prob, old, advantage[rows], section)
            if reference is None:
                return {"loss": loss, "ratio_clipped_fraction": clipped.float()}
            apart = k3(log_prob, reference[rows])
            measures = {"ratio_clipped_fraction": clipped.float(), "reference_divergence": apart}
            return {"loss": loss + section.kl * apart, **measures}

        logged: dict[str, Tensor] = {}
        teacher = None
        part, places = distilling(batch)
        if part.groups:
            self.opsd.heads = self.heads
            teacher = self.opsd.scorer(model, part, hidden[places], teachers[""])
        if teacher and self._in_one_sweep(model, batch, teacher):
            loss, own, logged["divergence"] = self._both(
                model, batch, hidden, teacher, (part, places), policy
            )
            measures = policy(own.log_prob)
        else:
            own = token_log_prob(model, hidden, batch, section, sampling)
            old = batch.old_log_prob(own.log_prob)
            if section.credit:
                its_head = teacher.weight, teacher.bias
                by_teacher = token_log_prob(
                    model, teacher.hidden, batch, section, sampling, its_head
                ).log_prob.detach()
                credit = batch.spread([sample.credit for sample in batch.samples])
                advantage = teacher_credit(of_rollout, old, by_teacher, credit, section.credit_clip)
                logged["credit_moved"] = (advantage - of_rollout).abs()
            measures = policy(own.log_prob)
            weights, more = corrected_for_engine(model, hidden, batch, section, sampling, old)
            loss, logged = (weights * measures["loss"]).sum(), logged | more
            if teacher and section.distil:
                beside = self.opsd.score(model, part, hidden[places], teacher)
                loss = loss + beside.loss
                logged["divergence"] = everywhere(beside, part, places, len(hidden))
        del measures["loss"]
        return TokenLosses(loss, {"student_entropy": own.entropy, **measures, **logged}, {})

    def _in_one_sweep(self, model: PreTrainedModel, batch: MicroBatch, teacher: Scorer) -> bool:
        """Whether the divergence's sweep of the head also computes the policy gradient."""
        weight = head(model)[0]
        alike = len(weight) == len(teacher.weight) and not hasattr(weight, "device_mesh")
        serves = self.opsd.in_one_sweep(batch, whole_temperature(self.sampling))
        return serves and alike and not self.section.credit

    def _both(
        self,
        model: PreTrainedModel,
        batch: MicroBatch,
        hidden: Tensor,
        teacher: Scorer,
        taught: tuple[MicroBatch, Tensor],
        policy: Callable[..., dict[str, Tensor]],
    ) -> tuple[Tensor, SampledLogProb, Tensor]:
        """The whole loss, and for each token log p and entropy (detached) and the divergence.
        Tokens that distil (`taught`) need one sweep for both losses, the others one for the policy
        gradient.
        """
        part, places = taught

        def beside(log_prob: Tensor, rows: Tensor | slice) -> Tensor:
            return batch.weights[places[rows]] * policy(log_prob, places[rows])["loss"]

        found = self.opsd.score(model, part, hidden[places], teacher, beside)
        alone = not_distilling(batch)
        own = token_log_prob(model, hidden, batch, self.section, self.sampling, rows=alone)
        loss = found.loss + (batch.weights[alone] * policy(own.log_prob, alone)["loss"]).sum()
        names = ("log_prob", "student_entropy")
        log_prob, entropy = (everywhere(found, part, places, len(hidden), name) for name in names)
        log_prob[alone], entropy[alone] = own.log_prob.detach(), own.entropy
        divergence = everywhere(found, part, places, len(hidden))
        return loss, SampledLogProb(log_prob, entropy), divergence


def distilling(batch: MicroBatch) -> tuple[MicroBatch, Tensor]:
    """The groups with a teacher, with the divergence's weights; and the indices of their tokens."""
    part, places = batch.part(lambda group: bool(group.teachers))
    part.weights *= part.spread([sample.distil for sample in part.samples])
    return part, places


def not_distilling(batch: MicroBatch) -> Tensor:
    """The indices of the tokens whose divergence has no weight. They are found without reading a
    tensor, which would wait for a GPU, and of which a plan has no values."""
    found: list[int] = []
    for group, sample, places in batch.places():
        weight = sample.weight * sample.distil if group.teachers else 0.0
        factors = sample.factors or [1.0] * sample.tokens
        found += [n for n, factor in zip(places, factors, strict=True) if not weight * factor]
    return torch.tensor(found, dtype=torch.int64, device=batch.device)


def everywhere(
    found: TokenLosses, part: MicroBatch, places: Tensor, tokens: int, name: str = "divergence"
) -> Tensor:
    """Expand a measure of the tokens that distil to all tokens [Σ R], 0 for the others."""
    values = torch.where(part.weights != 0, found.logged[name].detach(), 0.0)
    return values.new_zeros(tokens).index_copy_(0, places, values)


ROUNDING = 1e-6
"""The largest difference of equal rewards, relative to them: a few units of fp32's last place."""


def alike(rewards: Sequence[float]) -> bool:
    """Whether a group's rewards are equal but for rounding, such as .1 + .2 and .3."""
    return max(rewards) - min(rewards) <= ROUNDING * max(map(abs, rewards))


def group_advantages(rewards: Sequence[float], scale: bool) -> list[float]:
    """r - mean of a group's rewards, ÷ their standard deviation if `scale`; 0 if all are equal."""
    if alike(rewards):
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    if not scale:
        return centred
    largest = max(map(abs, centred))  # so that no square is 0 or infinite
    deviation = (sum((c / largest) ** 2 for c in centred) / len(centred)) ** 0.5
    return [c / largest / deviation for c in centred]


def credit_share(section: LossSection, step: int) -> float:
    """RLSD's λ: `loss.credit`, falling to 0 over `loss.credit_steps`."""
    if section.credit_steps is None:
        return section.credit
    return section.credit * max(0.0, 1 - step / section.credit_steps)
