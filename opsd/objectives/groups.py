"""Classes that the methods share: problems with rollouts, groups of samples, and a step's means."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd.config.loss import LossSection
from opsd.data.prompts import Context, Prompts
from opsd.data.rows import Row
from opsd.grading.majority import Majority
from opsd.grading.rewards import GradedRollout
from opsd.models.head import is_split, keeping_router_logits
from opsd.models.routers import router_loss
from opsd.models.teacher import Member
from opsd.objectives.token_weights import TokenWeighting
from opsd.prefix import Group, Ids, student_and_teacher_states
from opsd.rollout import Rollout, Sampling


@dataclass(frozen=True)
class Problem:
    """A row, its contexts, and the rollouts that the student wrote for it (none for SFT).

    outcomes: of each rollout, if they are graded. teachers: for each role whose template contains
    rollouts, its context for each rollout; None for a rollout without one. majority: the majority
    answer of the rollouts, if the row has no solution and they vote.
    """

    row: Row
    context: Context
    rollouts: list[Rollout]
    outcomes: list[GradedRollout] | None = None
    teachers: Mapping[str, list[list[int] | None]] = field(default_factory=dict)
    majority: Majority | None = None

    @property
    def graded(self) -> list[tuple[Rollout, GradedRollout | None]]:
        """Each rollout with its outcome, or None."""
        outcomes = self.outcomes or [None] * len(self.rollouts)
        return list(zip(self.rollouts, outcomes, strict=True))

    def teacher_contexts(self, role: str = "teacher") -> list[list[int] | None]:
        """The context in which a teacher of this role sees each rollout."""
        if role in self.teachers:
            return self.teachers[role]
        return [self.context.of(role)] * len(self.rollouts)


@dataclass(frozen=True)
class Sample:
    """One rollout to train on, and its tokens' weights.

    Weights are already divided by the step's tokens, so the step's loss is the plain sum over
    micro-batches, however the groups are split.
    """

    rollout: Ids
    weight: float  # of each token
    factors: Sequence[float] | None = None  # a further factor for each token; None: 1
    teacher: int = 0  # number of the group's teacher context in which it is scored
    advantage: float = 0.0  # grpo
    credit: float = 0.0  # grpo: how much the teacher redistributes the advantage over tokens
    distil: float = 0.0  # grpo: weight of the additional divergence to the teacher
    sampling_log_probs: Sequence[float] | None = None  # the engine's, for each token; see Rollout
    old_log_probs: Sequence[float] | None = None  # the student's, before the step's first update

    @property
    def tokens(self) -> int:
        """The number of tokens that are scored."""
        return len(self.rollout)

    @property
    def counted(self) -> int:
        """The number of tokens that are trained on: those with a weight."""
        if self.factors is None:
            return self.tokens
        return sum(factor != 0 for factor in self.factors)


@dataclass(frozen=True)
class SampleGroup:
    """A problem's samples and the contexts that they share.

    student: the context that the student continues. teachers: the teacher's contexts: none for a
    method without a teacher, one for all samples, or several if the template contains rollouts.
    With teacher.mix, each is one context for each member, next to each other. coefficients: the
    members'. route: the teacher's name in teacher.routes. given: the texts are the row's own, which
    no teacher sees (`loss.sft_alpha`). Pieces of a group have the same context objects:
    `is_piece_with` compares no tokens.
    """

    student: Ids
    samples: Sequence[Sample]
    teachers: Sequence[Ids] = ()
    coefficients: Sequence[float] = (1.0,)
    route: str = ""
    given: bool = False

    def of(self, samples: Sequence[Sample]) -> "SampleGroup":
        """A piece of this group, with some of its samples."""
        return replace(self, samples=samples)

    def is_piece_with(self, other: "SampleGroup") -> bool:
        """Whether both are pieces of the same group."""
        mine, its = (self.student, *self.teachers), (other.student, *other.teachers)
        return len(mine) == len(its) and all(a is b for a, b in zip(mine, its, strict=True))

    def by_teacher(self) -> list["SampleGroup"]:
        """Pieces of consecutive samples that are scored in the same teacher context."""
        return [self.of(list(some)) for _, some in groupby(self.samples, lambda s: s.teacher)]

    def longest(self) -> int:
        """Tokens of the longest sequence: a context with a rollout."""
        return max(
            sample.tokens + max(map(len, [self.student, *self.teachers_of([sample])]))
            for sample in self.samples
        )

    def teachers_of(self, samples: Iterable[Sample]) -> list[Ids]:
        """The teacher contexts of some samples, each once."""
        if not self.teachers:
            return []
        numbers, size = dict.fromkeys(s.teacher for s in samples), len(self.coefficients)
        return [each for n in numbers for each in self.teachers[n * size : (n + 1) * size]]

    def as_student(self) -> Group:
        """The student's context and the rollouts that continue it."""
        return self.student, [sample.rollout for sample in self.samples]

    def as_teacher(self, member: int = 0) -> list[Group]:
        """A member's contexts with the rollouts that continue them, in the samples' order."""
        return [
            (self.teachers_of(piece.samples)[member], [s.rollout for s in piece.samples])
            for piece in (self.by_teacher() if self.teachers else [])
        ]


def sample_group(
    student: Ids,
    pairs: Iterable[tuple[Sample, Sequence[Ids]]],
    coefficients: Sequence[float] = (1.0,),
    route: str = "",
) -> SampleGroup:
    """Make a group of samples, each with its contexts for the teacher's members."""
    teachers: list[Sequence[Ids]] = []
    samples = []
    for sample, contexts in pairs:
        if contexts not in teachers:
            teachers.append(contexts)
        samples.append(replace(sample, teacher=teachers.index(contexts)))
    shown = [each for own in teachers for each in own]
    return SampleGroup(student, samples, shown, coefficients, route)


def samples_of(groups: Iterable[SampleGroup]) -> list[Sample]:
    """All samples, in the groups' order."""
    return [sample for group in groups for sample in group.samples]


def scored_tokens(groups: Iterable[SampleGroup]) -> int:
    """The tokens of all samples that have a weight."""
    return sum(sample.tokens for sample in samples_of(groups) if sample.weight)


def as_student(groups: Iterable[SampleGroup]) -> list[Group]:
    """The student's contexts, each with its rollouts."""
    return [group.as_student() for group in groups]


def as_teacher(groups: Iterable[SampleGroup], member: int = 0) -> list[Group]:
    """The contexts of a teacher's member, each with its rollouts."""
    return [each for group in groups for each in group.as_teacher(member)]


def shortest(groups: Iterable[SampleGroup]) -> SampleGroup:
    """The piece that has the shortest sample alone."""
    pieces = (group.of([sample]) for group in groups for sample in group.samples)
    return min(pieces, key=SampleGroup.longest)


@dataclass
class Totals:
    """Sums over a step's tokens, to compute the step's means; parts: the sums over the tokens of
    one of several teachers, or of given text (`sft`), which the others do not contain."""

    tokens: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, "Totals"] = field(default_factory=dict)

    @property
    def trained(self) -> int:
        """The number of all tokens that are trained on."""
        return self.tokens + (self.parts["sft"].tokens if "sft" in self.parts else 0)

    def part(self, name: str) -> "Totals":
        """The sums over one part's tokens."""
        return self.parts.setdefault(name, Totals())

    def add(self, tokens: int, **means: Tensor) -> None:
        """Add a micro-batch of `tokens` tokens with these means, scalars on any device.

        They stay on the device: reading them would wait for a GPU in every micro-batch.
        """
        self.tokens += tokens
        for name, mean in means.items():
            self.sums[name] = self.sums.get(name, 0.0) + mean.detach().double() * tokens

    def numbers(self) -> "Totals":
        """A copy on the CPU, to send to other processes."""
        parts = {name: part.numbers() for name, part in self.parts.items()}
        return Totals(self.tokens, {name: total.cpu() for name, total in self.sums.items()}, parts)

    def include(self, other: "Totals") -> None:
        """Add the totals of another update or process."""
        self.tokens += other.tokens
        for name, total in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + total
        for name, part in other.parts.items():
            self.part(name).include(part)

    def means(self) -> dict[str, float]:
        """The means over all tokens that were added, and over each part's."""
        means = {name: total.item() / self.tokens for name, total in self.sums.items()}
        for part, own in self.parts.items():
            means |= {f"{part}_{name}": mean for name, mean in own.means().items()}
        return means


class MicroBatch:
    """Groups that run in one forward. Its tensors [Σ R] have an entry for each rollout token, in
    the samples' order.

    Attributes:
        share: run each context once for all its samples.
        weights: the tokens' weights, fp32.
        counted: the number of tokens with a weight; at least 1, since means are divided by it.
    """

    def __init__(self, groups: Sequence[SampleGroup], device: torch.device, share: bool = True):
        self.groups, self.device, self.share = groups, device, share
        self.samples = samples_of(groups)
        self.counted = max(1, sum(sample.counted for sample in self.samples))
        self.weights = self.spread([sample.weight for sample in self.samples])
        if any(s.factors is not None for s in self.samples):
            each = (s.factors or [1.0] * s.tokens for s in self.samples)
            self.weights *= torch.tensor([f for own in each for f in own], device=device)

    def part(self, chosen: Callable[[SampleGroup], bool]) -> tuple["MicroBatch", Tensor]:
        """Some of the groups, and the indices of their tokens, int64."""
        some = MicroBatch(list(filter(chosen, self.groups)), self.device, self.share)
        places = [n for group, _, its in self.places() if chosen(group) for n in its]
        return some, torch.tensor(places, dtype=torch.int64, device=self.device)

    def places(self) -> Iterator[tuple[SampleGroup, Sample, range]]:
        """Each sample with its group and the indices of its tokens."""
        end = 0
        for group in self.groups:
            for sample in group.samples:
                yield group, sample, range(end, end := end + sample.tokens)

    def by(
        self, kind: Callable[[SampleGroup], Any]
    ) -> list[tuple[Any, "MicroBatch", Tensor | slice]]:
        """The `part` of each kind of groups."""
        kinds = list(dict.fromkeys(map(kind, self.groups)))
        if len(kinds) == 1:
            return [(kinds[0], self, slice(None))]
        return [(each, *self.part(lambda g: kind(g) == each)) for each in kinds]  # noqa: B023

    @property
    def sampled_by_others(self) -> bool:
        """Whether every sample has log-probabilities of what sampled it: an engine, or the student
        before the step's first update."""
        given = (s.sampling_log_probs or s.old_log_probs for s in self.samples)
        return all(log_probs is not None for log_probs in given)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each rollout."""
        return [sample.tokens for sample in self.samples]

    def targets(self) -> Tensor:
        """The rollouts' tokens, int64."""
        return torch.tensor(
            [token for s in self.samples for token in s.rollout], device=self.device
        )

    def spread(self, values: Sequence[float]) -> Tensor:
        """Repeat each sample's value for each of its tokens, fp32."""
        pairs = zip(values, self.samples, strict=True)
        each = [value for value, sample in pairs for _ in range(sample.tokens)]
        return torch.tensor(each, dtype=torch.float32, device=self.device)

    def coefficients(self) -> list[float | Tensor]:
        """The coefficients of the teacher's members; tensors [Σ R] if they differ by group."""
        made: list[float | Tensor] = []
        for own in zip(*(group.coefficients for group in self.groups), strict=True):
            each = [c for c, group in zip(own, self.groups, strict=True) for _ in group.samples]
            made.append(own[0] if len(set(own)) == 1 else self.spread(each))
        return made

    def old_log_prob(self, current: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """log p of some tokens before the step's first update; in that update, `current`."""
        if all(sample.old_log_probs is None for sample in self.samples):
            return current.detach()
        old = [value for s in self.samples for value in s.old_log_probs]
        return torch.tensor(old, device=current.device)[rows]

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values` over the tokens with a weight."""
        return torch.where(self.weights != 0, values.detach(), 0.0).sum() / self.counted


class TokenLosses(NamedTuple):
    """A micro-batch's loss (scalar); values to log for each token [Σ R]; values for all together;
    and totals of parts of the tokens."""

    loss: Tensor
    logged: dict[str, Tensor]
    of_all: dict[str, Tensor]
    parts: Mapping[str, Totals] = {}


class Objective:
    """A method: makes groups of samples from a step's problems, and computes their loss.

    section: `loss`. teacher: a frozen model, or the live one; for grpo the reference of `loss.kl`
    and the source of `loss.credit`. weighting: computes tokens' weights; None: as `section` says.
    classes: of the vocabulary's entries, by `class_table`, to log the divergence by class.
    sampling: the distribution of rollouts, to which log-probabilities refer; None: the model's own.
    prompts: makes the target texts of sft and of loss.sft_alpha. mix: the members of teacher.mix or
    the teachers of teacher.routes, used instead of `teacher`.
    """

    samples_rollouts = True  # False: the method trains on given text
    teacher_role = "teacher"  # the context that a teacher sees, "student" or "teacher"
    beside: "Objective | None" = None  # the objective for given text in the same step

    def __init__(
        self,
        section: LossSection,
        teacher: PreTrainedModel | None = None,
        weighting: TokenWeighting | None = None,
        classes: Tensor | None = None,
        sampling: Sampling | None = None,
        prompts: Prompts | None = None,
        mix: Sequence[Member] = (),
    ):
        self.section, self.teacher, self.sampling = section, teacher, sampling
        self.classes, self.prompts = classes, prompts
        self.weighting = weighting or TokenWeighting(section)
        self.members = [
            replace(member, context=member.context or self.teacher_role)
            for member in mix or [Member(teacher, "")]
        ]
        self.routes: dict[str, list[Member]] = {}
        for member in self.members:
            self.routes.setdefault(member.route, []).append(member)
        # A cache of a mixture's joined heads, if the caller clears it when weights change.
        self.heads: dict[tuple[int, ...], Tensor] | None = None
        # The tokens of the whole step, of which a micro-batch has a share; None: this is all.
        self.tokens: int | None = None

    def sample_groups(
        self, problems: Sequence[Problem], step: int = 0
    ) -> tuple[list[SampleGroup], dict[str, float]]:
        """Make groups of samples from a step's problems, and measures for the log."""
        raise NotImplementedError

    def token_losses(
        self,
        model: PreTrainedModel,
        batch: MicroBatch,
        student: Tensor,
        teachers: Mapping[str, Sequence[Tensor]],
    ) -> TokenLosses:
        """The micro-batch's part of the step's loss, and its measures, from the student's states [Σ
        R, D] and, by route, the states of each teacher member for the groups that it sees."""
        raise NotImplementedError

    def contexts(self, problem: Problem, route: str = "") -> list[list[Ids] | None]:
        """Each rollout's contexts, one for each member of a teacher; None if one is missing."""
        each = (problem.teacher_contexts(member.context) for member in self.routes[route])
        return [None if None in own else list(own) for own in zip(*each, strict=True)]

    def coefficients(self, problem: Problem, step: int, route: str = "") -> list[float]:
        """The coefficients of a teacher's members for the rollouts of a problem."""
        columns = problem.row.columns
        return [member.coefficient(step, columns) for member in self.routes[route]]

    def states(
        self, model: PreTrainedModel, batch: MicroBatch
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Compute the states that `token_losses` takes."""
        seen = {
            route: [group for group in batch.groups if group.teachers and group.route == route]
            for route in self.routes
        }
        present = {route: self.routes[route] for route, groups in seen.items() if groups}
        asked = [
            (member.model, as_teacher(seen[route], number))
            for route, members in present.items()
            for number, member in enumerate(members)
        ]
        if is_split(model):  # a live teacher runs in each micro-batch, even without groups
            idle = [m for m in self.members if m.model is model and m.route not in present]
            asked += [(model, [shortest(batch.groups).as_student()]) for _ in idle]
        student, found = student_and_teacher_states(
            model, as_student(batch.groups), asked, batch.share
        )
        each = iter(found)
        return student, {route: [next(each) for _ in members] for route, members in present.items()}

    def loss(
        self,
        model: PreTrainedModel,
        groups: Sequence[SampleGroup],
        totals: Totals,
        share: bool = True,
    ) -> Tensor:
        """The micro-batch's part of the step's loss (scalar); adds its measures to `totals`.

        `share`: run each context once for all its samples.
        """
        batch = MicroBatch(groups, model.device, share)
        with keeping_router_logits(self.section.router_aux > 0) as routed:
            student, teachers = self.states(model, batch)
        losses = [self._router_loss(model, batch, *each, totals) for each in routed]
        for given, part, places in batch.by(lambda group: group.given):
            objective, own = (self.beside, totals.part("sft")) if given else (self, totals)
            found = objective.token_losses(model, part, student[places], teachers)
            means = {name: part.mean(values) for name, values in found.logged.items()}
            own.add(part.counted, **means, **found.of_all)
            for name, measures in found.parts.items():
                own.part(name).include(measures)
            losses.append(found.loss)
        return sum(losses[1:], losses[0])

    def _router_loss(
        self,
        model: PreTrainedModel,
        batch: MicroBatch,
        logits: tuple[Tensor, ...],
        counted: Tensor | None,
        totals: Totals,
    ) -> Tensor:
        """loss.router_aux times the routers' loss, for this micro-batch's share of the step."""
        found, tokens = router_loss(model, logits, counted), scored_tokens(batch.groups)
        if tokens:
            totals.part("router").add(tokens, aux_loss=found)
        return self.section.router_aux * tokens / (self.tokens or tokens or 1) * found
