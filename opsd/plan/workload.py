"""A training step without data: samples of the planned lengths, and their micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from opsd.config.config import Config
from opsd.config.names import DIVERGENCE_METHODS
from opsd.config.requirements import learns_targets
from opsd.objectives import Sample
from opsd.prefix.rollout_states import Scored
from opsd.training.micro_batches import packed_batches, padded_batches, stream_tokens


@dataclass(frozen=True)
class Lengths:
    """Tokens: of a problem in its prompt, of a solution beside it, of a rollout.

    Every sequence is as long as this: a plan for the longest ones is an upper bound.
    """

    prompt: int = 200
    solution: int = 1000
    rollout: int = 1024


@dataclass(frozen=True)
class Tokens:
    """A step's tokens: sampled, and run through the model for training, in all roles."""

    generated: int
    trained: int  # those with a loss
    alone: int  # each rollout with a context of its own
    shared: int  # each context once
    student: int  # of those that run, the student's
    teacher: int


def samples(config: Config, lengths: Lengths) -> list[Sample]:
    """The step's samples. Their ids mean nothing; only contexts of one problem share their ids."""
    sft = config.method == "sft"
    roles = config.loss.roles if sft else ["student"]
    answer = lengths.solution if sft else lengths.rollout
    copies = 1 if learns_targets(config) else config.rollout.group_size
    made = []
    for number in range(config.train.problems_per_step):
        problem = [number % 7 + 1] * (lengths.prompt - 1) + [number]
        contexts = {"student": problem, "teacher": problem + [1] * lengths.solution}
        rollout = [0] * answer
        if config.method in DIVERGENCE_METHODS or config.loss.credit:
            seen = "student" if config.method == "distill" else "teacher"
            scored = (Scored(problem, rollout), Scored(contexts[seen], rollout))
            made += [Sample(scored, 1.0)] * copies
        else:
            made += [Sample((Scored(contexts[r], rollout),), 1.0) for r in roles] * copies
    return made


def micro_batches(step: list[Sample], tokens: int, share: bool) -> list[list[Sample]]:
    """Packs samples as `OPSDStep` does."""
    batches = packed_batches if share else padded_batches
    return batches(step, _roles, tokens)


def count_tokens(config: Config, step: list[Sample], lengths: Lengths) -> Tokens:
    """The step's tokens. A live teacher does not run the prefix that both contexts share."""
    shared = stream_tokens(step, _roles)
    if len(shared) == 2 and config.teacher.policy == "live":
        shared[1] -= config.train.problems_per_step * lengths.prompt
    return Tokens(
        generated=0 if learns_targets(config) else sum(sample.tokens for sample in step),
        trained=sum(sample.tokens for sample in step),
        alone=sum(len(role) - 1 for sample in step for role in sample.roles),
        shared=sum(shared),
        student=shared[0],
        teacher=shared[1] if len(shared) == 2 else 0,
    )


def _roles(sample: Sample):
    return sample.roles
