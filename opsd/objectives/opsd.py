"""On-policy self-distillation: the student's rollout, scored token by token by the teacher.

The student sees the problem, the teacher sees the problem and a solution. At each rollout token n
the loss is D(p_T(·|n) ‖ p_S(·|n)) over the whole vocabulary. Its gradient flows through the student
only. The step's loss is the mean over all its rollout tokens.

With `loss.divergence: sampled_token` the loss is a policy gradient of the tokens that were sampled,
with the advantage A_n = log p_T(y_n) - log p_S(y_n), where p_S is the student before the step's
first update. In that update its expectation is the gradient of KL(p_S ‖ p_T), estimated from one
token instead of the whole vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd.common.step_timer import phase
from opsd.config.loss import LossSection
from opsd.models.head import Scorer, as_operands, head, head_arguments, mixed
from opsd.objectives.gates import Measures, gated
from opsd.objectives.groups import (
    MicroBatch,
    Objective,
    Problem,
    Sample,
    SampleGroup,
    TokenLosses,
    Totals,
    sample_group,
    samples_of,
)
from opsd.objectives.importance_sampling import corrected_for_engine, corrected_for_sampling
from opsd.objectives.log_probs import token_log_prob
from opsd.objectives.policy_gradient import surrogate
from opsd.objectives.sft import Given
from opsd.objectives.token_classes import split_by_class
from opsd.objectives.token_weights import balanced
from opsd.prefix import Ids
from opsd_kernels import Clip, LinearDivergence, linear_divergence


class OPSD(Objective):
    """The divergence between the teacher and the trained model."""

    def __init__(self, section: LossSection, *what: Any, **more: Any):
        super().__init__(section, *what, **more)
        self.by_token = section.divergence == "sampled_token"
        if not self.by_token:  # only a policy gradient depends on the sampling distribution
            self.sampling = None
        self.clip = None if section.clip == "none" else Clip(section.clip, section.clip_threshold)
        self.beside = Given(section, prompts=self.prompts)

    def sample_groups(
        self, problems: Sequence[Problem], step: int = 0
    ) -> tuple[list[SampleGroup], dict[str, float]]:
        """Each rollout in all its contexts; rollouts without a teacher context are left out."""
        routes = [self.members[0].route_of(p.row.columns) for p in problems]
        taught = [
            (number, *graded, contexts)
            for number, (p, route) in enumerate(zip(problems, routes, strict=True))
            for graded, contexts in zip(p.graded, self.contexts(p, route), strict=True)
            if contexts is not None
        ]
        weights = self.weighting([r for _, r, _, _ in taught], [o for _, _, o, _ in taught])
        measures = {}
        if len(self.routes) > 1:
            its = [(routes[number], rollout) for number, rollout, _, _ in taught]
            weights, shares = balanced(weights, its, self.section.weights.balance)
            measures = {f"teacher_{route}_tokens": share for route, share in shares.items()}
        pairs: list[list[tuple[Sample, list[Ids]]]] = [[] for _ in problems]
        for (number, rollout, _, contexts), weight in zip(taught, weights, strict=True):
            sample = Sample(rollout.ids, *weight, sampling_log_probs=rollout.sampling_log_probs)
            if sample.weight:
                pairs[number].append((sample, contexts))
        groups = [
            sample_group(p.context.student, own, self.coefficients(p, step, route), route)
            for p, own, route in zip(problems, pairs, routes, strict=True)
            if own
        ]
        used = len(samples_of(groups)) / sum(len(p.rollouts) for p in problems)
        measures |= {} if used == 1 else {"trained_fraction": used}
        return groups + self.beside.sample_groups(problems)[0], measures

    def token_losses(
        self,
        model: PreTrainedModel,
        batch: MicroBatch,
        student: Tensor,
        teachers: Mapping[str, Sequence[Tensor]],
    ) -> TokenLosses:
        each = []
        for route, part, places in batch.by(lambda group: group.route):  # a teacher or mixture each
            teacher = self.scorer(model, part, own := student[places], teachers[route])
            each.append((route, part, places, self.score(model, part, own, teacher)))
        found = each[0][-1] if len(each) == 1 else _together(batch, each)
        if self.classes is not None:
            by_class = split_by_class(self.classes, batch.targets(), found.logged["divergence"])
            found.logged.update({f"divergence_{name}": each for name, each in by_class.items()})
        if len(self.routes) == 1:
            return found
        parts = {f"teacher_{route}": Totals() for route, *_ in each}
        for route, part, _, its in each:
            apart = part.mean(its.logged["divergence"])
            parts[f"teacher_{route}"].add(part.counted, divergence=apart)
        return found._replace(parts=parts)

    def scorer(
        self, model: PreTrainedModel, batch: MicroBatch, student: Tensor, states: Sequence[Tensor]
    ) -> Scorer:
        """The teacher, or the mixture of its members, of groups that have the same one. `states`:
        those of each member; `student`: the student's, which `damping` looks at."""
        members = self.routes[batch.groups[0].route]
        coefficients, size = batch.coefficients(), len(head(model)[0])
        if any(member.section.damping for member in members):
            coefficients = self._damped(model, student, states, coefficients)
        models = [member.model for member in members]
        return mixed(models, states, coefficients, size, self.heads)

    @torch.no_grad()
    def _damped(
        self,
        model: PreTrainedModel,
        student: Tensor,
        states: Sequence[Tensor],
        coefficients: list[float | Tensor],
    ) -> list[float | Tensor]:
        """The coefficients, one member's of which grows with the distance between the student and
        the mixture of the others. This costs one more sweep (DemoPSD, arXiv 2607.02502)."""
        number = next(n for n, member in enumerate(self.members) if member.section.damping)
        rest = [n for n in range(len(self.members)) if n != number]
        its, c = [states[n] for n in rest], [coefficients[n] for n in rest]
        models = [self.members[n].model for n in rest]
        others = mixed(models, its, c, len(head(model)[0]), self.heads)
        what = {"divergence": "jsd", "temperature": self.section.temperature, "reduction": "none"}
        apart = self._divergence(model, student, others, **what).per_token
        damping = (self.members[number].section.damping * apart).sigmoid() * 2 - 1
        own = coefficients[number] * damping
        return [own if n == number else c * (1 - own) for n, c in enumerate(coefficients)]

    def score(
        self,
        model: PreTrainedModel,
        batch: MicroBatch,
        student: Tensor,
        teacher: Scorer,
        token_loss: Callable[..., Tensor] | None = None,
    ) -> TokenLosses:
        """The losses from both roles' states [Σ R, D].

        token_loss: computed in the same sweep as the divergence (`linear_divergence`), if
        `in_one_sweep`; the log-probabilities are then among the logged values.
        """
        if self.by_token:
            return self._sampled_token(model, batch, student, teacher)
        section = self.section
        weights = batch.weights
        corrections: dict[str, Tensor] = {}
        if section.importance_bound is not None and batch.sampled_by_others:
            weights, corrections = corrected_for_sampling(model, student, batch, section)
        gates, each = section.gates, section.gates or section.unsure
        shared = {"temperature": section.temperature, "clip": self.clip}
        shared["reduction"] = "none" if each else "sum"
        result = self._divergence(
            model,
            student,
            teacher,
            divergence=section.divergence,
            beta=section.beta,
            token_weight=weights,
            targets=batch.targets() if gates or token_loss else None,
            token_loss=token_loss,
            **shared,
        )
        loss = result.loss
        if section.unsure:  # this sweep skips the other tokens, which have weight 0
            unsure = weights * (section.unsure * (result.teacher_entropy > section.unsure_entropy))
            what = {"divergence": "forward_kl", "token_weight": unsure, **shared}
            loss = loss + self._divergence(model, student, teacher, **what).loss
        names = ("student_entropy", "teacher_entropy")
        logged = {"divergence": result.per_token, **{name: getattr(result, name) for name in names}}
        fractions = ("clipped_fraction", "inverted_gradient_fraction") if self.clip else ()
        of_all = {name: getattr(result, name) for name in fractions}
        if token_loss:
            logged["log_prob"] = result.log_prob
        if not gates:
            return TokenLosses(loss.sum(), logged | corrections, of_all)
        log_probs = {"log_prob": result.log_prob, "teacher_log_prob": result.teacher_log_prob}
        logged["gate"] = gate = gated(gates, Measures(**logged, **log_probs, lengths=batch.lengths))
        return TokenLosses((gate * loss).sum(), logged | corrections, of_all)

    def in_one_sweep(self, batch: MicroBatch, temperature: float | None) -> bool:
        """Whether a loss of the tokens' log-probabilities at `temperature` can share the
        divergence's sweep: not if that uses other logits, or its weights depend on its results."""
        section = self.section
        corrected = section.importance_bound is not None and batch.sampled_by_others
        plain = not (self.by_token or section.gates or section.unsure or corrected)
        return plain and section.temperature == temperature

    def _divergence(
        self, model: PreTrainedModel, student: Tensor, teacher: Scorer, **what: Any
    ) -> LinearDivergence:
        (weight, bias), teacher_weight = head(model), teacher.weight
        if len(weight) != len(teacher_weight):
            # The heads have different padding. The rows that both have contain all tokens.
            weight = weight[: len(teacher_weight)]
            bias = None if bias is None else bias[: len(teacher_weight)]
        if teacher_weight is weight:
            teacher_weight = None  # both use one head, so one product computes both
        tensors = (student, teacher.hidden, weight, teacher_weight, bias, teacher.bias)
        *operands, bias, teacher_bias = as_operands(tensors)
        what |= {"memory_budget": self.section.memory_budget, "backend": self.section.backend}
        what |= {"bias": bias, "teacher_bias": teacher_bias, **head_arguments(model)}
        with phase("loss"):
            return linear_divergence(*operands, **what)

    def _sampled_token(
        self, model: PreTrainedModel, batch: MicroBatch, student: Tensor, teacher: Scorer
    ) -> TokenLosses:
        """A policy gradient; a token's divergence is estimated as log p_S - log p_T."""
        section, sampling = self.section, self.sampling
        own = token_log_prob(model, student, batch, section, sampling)
        with torch.no_grad():
            its_head = teacher.weight, teacher.bias
            scored = token_log_prob(model, teacher.hidden, batch, section, sampling, its_head)
        old = batch.old_log_prob(own.log_prob)
        advantage = scored.log_prob - old
        logged = {"divergence": -advantage, "student_entropy": own.entropy}
        logged["teacher_entropy"] = scored.entropy
        if section.control_variate:
            # The advantage's mean, -KL(S ‖ T), adds no direction to the gradient, only noise.
            temperature = (sampling.temperature if sampling else 0) or 1.0
            what = {"divergence": "reverse_kl", "temperature": temperature, "reduction": "none"}
            with torch.no_grad():
                between = self._divergence(model, student, teacher, **what)
            advantage = advantage + between.per_token
        per_token, clipped = surrogate(own.log_prob, old, advantage, section)
        weights, corrections = corrected_for_engine(model, student, batch, section, sampling, old)
        if section.gates:
            log_probs = {"log_prob": old, "teacher_log_prob": scored.log_prob}
            measures = Measures(**logged, **log_probs, lengths=batch.lengths)
            logged["gate"] = gate = gated(section.gates, measures)
            weights = weights * gate
        logged["ratio_clipped_fraction"] = clipped.float()
        return TokenLosses((weights * per_token).sum(), logged | corrections, {})


def _together(batch: MicroBatch, each: Sequence[tuple]) -> TokenLosses:
    """Join the losses of several teachers' parts of a batch."""
    _, parts, places, found = zip(*each, strict=True)
    order = torch.cat(places).argsort()
    logged = {
        name: torch.cat([one.logged[name].detach() for one in found])[order]
        for name in found[0].logged
    }
    shares = [part.counted / batch.counted for part in parts]
    of_all = {
        name: sum(share * one.of_all[name] for share, one in zip(shares, found, strict=True))
        for name in found[0].of_all
    }
    return TokenLosses(sum(one.loss for one in found), logged, of_all)
