"""A training step without real data: sample groups of the planned lengths, and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from opsd.config.config import Config
from opsd.config.names import DIVERGENCE_METHODS
from opsd.config.requirements import learns_targets, teacher_roles
from opsd.objectives import Sample, SampleGroup, samples_of
from opsd.training.micro_batches import (
    packed_batches,
    padded_batches,
    separate_tokens,
    stream_tokens,
)


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens: a problem with its prompt, a solution added to it, a rollout.

    Every sequence of the plan has these lengths; with the longest ones it is an upper bound.
    """

    prompt: int = 200
    solution: int = 1000
    rollout: int = 1024


@dataclass(frozen=True)
class Tokens:
    """A step's numbers of tokens: sampled ones, and those that training runs, in all roles."""

    generated: int
    trained: int  # tokens with a loss
    alone: int  # run if each rollout has its own context
    shared: int  # run if each context runs once
    student: int  # the student's part of `shared`
    teacher: int


def sample_groups(config: Config, lengths: Lengths) -> list[SampleGroup]:
    """The step's groups with made-up token ids, which only a problem's own contexts share."""
    sft = config.method == "sft"
    answer = lengths.solution if sft else lengths.rollout
    copies = 1 if learns_targets(config) else config.rollout.group_size
    samples, groups = [Sample([0] * answer, 1.0, distil=config.loss.distil)] * copies, []
    for number in range(config.train.problems_per_step):
        problem = [number % 7 + 1] * (lengths.prompt - 1) + [number]
        shown = problem + [1] * lengths.solution
        if config.method in DIVERGENCE_METHODS or config.loss.credit or config.loss.distil:
            seen = teacher_roles(config)
            teachers = [problem if role == "student" else shown for role in seen]
            groups.append(SampleGroup(problem, samples, teachers, [1.0] * len(teachers)))
        else:
            roles = config.loss.roles if sft else ["student"]
            contexts = [problem if role == "student" else shown for role in roles]
            groups += [SampleGroup(context, samples) for context in contexts]
        if config.loss.sft_alpha:
            given = [Sample([0] * lengths.solution, config.loss.sft_alpha)]
            groups.append(SampleGroup(list(problem), given, given=True))
    return groups


def micro_batches(step: list[SampleGroup], tokens: int, share: bool) -> list[list[SampleGroup]]:
    """Pack groups into micro-batches as `OPSDStep` does."""
    batches = packed_batches if share else padded_batches
    return batches(step, tokens)


def count_tokens(config: Config, step: list[SampleGroup], lengths: Lengths) -> Tokens:
    """Count a step's tokens. A live teacher reuses the prefix that its context shares with the
    student's, and a mixture's member the prefix of an earlier member with the same weights."""
    student, teacher = (tokens := stream_tokens(step)).student, tokens.teacher
    weights = [(own.policy, own.path, own.revision) for own in config.teacher.members()]
    read = sum(own[0] == "live" or own in weights[:n] for n, own in enumerate(weights))
    if teacher and not config.teacher.routes:
        teacher -= read * config.train.problems_per_step * lengths.prompt
    trained = sum(sample.tokens for sample in samples_of(step))
    given = sum(sample.tokens for group in step if group.given for sample in group.samples)
    return Tokens(
        generated=0 if learns_targets(config) else trained - given,
        trained=trained,
        alone=sum(separate_tokens(step)),
        shared=student + teacher,
        student=student,
        teacher=teacher,
    )
