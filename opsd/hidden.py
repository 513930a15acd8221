"""The hidden states that predict a rollout's tokens, for a batch of contexts and rollouts.

Legend: P context length, R rollout length, D hidden width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd.parts import part
from opsd.prefix import (
    Group,
    live_hidden_states,
    separate_hidden_states,
    shared_prefix_hidden_states,
)


@dataclass(frozen=True)
class Scored:
    """A rollout in one role: the context it continues, and its own tokens."""

    context: Sequence[int]
    rollout: Sequence[int]

    def __len__(self) -> int:
        return len(self.context) + len(self.rollout)


def rollout_hidden_states(
    model: PreTrainedModel, sequences: Sequence[Scored], share: bool = True
) -> Tensor:
    """The last hidden states, after the final norm, that predict each rollout token: [Σ R, D].

    The state at position P - 1 predicts the first rollout token. The last rollout token is a target
    only and is not run through the model. `share`: a context that neighbours have in common is run
    once, and nothing is padded; the result is the same.
    """
    run = shared_prefix_hidden_states if share else separate_hidden_states
    return run(model, _groups(sequences))


def both_roles_hidden_states(
    model: PreTrainedModel,
    student: Sequence[Scored],
    teacher: Sequence[Scored],
    share: bool = True,
) -> tuple[Tensor, Tensor]:
    """`rollout_hidden_states` of a model that is its own teacher, whose states have no gradient.

    `share`: the tokens that both contexts start with run once, too.
    """
    if share and len(_groups(student)) == len(_groups(teacher)):
        return live_hidden_states(model, _groups(student), _groups(teacher))
    # The student first: autocast keeps the weights that it casts, for both, and must cast them
    # with their graph.
    with part("student"):
        states = rollout_hidden_states(model, student, share)
    with torch.no_grad(), part("teacher"):
        return states, rollout_hidden_states(model, teacher, share)


def student_and_teacher(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    students: Sequence[Scored],
    teachers: Sequence[Scored],
    share: bool = True,
) -> tuple[Tensor, Tensor]:
    """`rollout_hidden_states` of both roles; the teacher's, which may be `model` itself, have no
    gradient.
    """
    if teacher is model:
        return both_roles_hidden_states(model, students, teachers, share)
    with torch.no_grad(), part("teacher"):
        seen = rollout_hidden_states(teacher, teachers, share)
    with part("student"):
        return rollout_hidden_states(model, students, share), seen


def _groups(sequences: Sequence[Scored]) -> list[Group]:
    """Neighbours with the same context, together."""
    groups = ((context, list(rest)) for context, rest in groupby(sequences, _context))
    return [(context, [sequence.rollout for sequence in rest]) for context, rest in groups]


def _context(sequence: Scored) -> Sequence[int]:
    return sequence.context


Item = TypeVar("Item")
Roles = Callable[[Item], tuple[Scored, ...]]


def padded_batches(items: Sequence[Item], roles: Roles, max_tokens: int) -> list[list[Item]]:
    """Group items so that no padded batch exceeds `max_tokens`; like lengths together.

    `roles(item)` is what is run for it, one sequence a role, each role in a forward of its own. A
    single item longer than `max_tokens` gets a batch of its own.
    """

    def longest(item: Item) -> int:
        return max(map(len, roles(item)))

    batches: list[list[Item]] = []
    for item in sorted(items, key=longest):
        if batches and longest(item) * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


def packed_batches(
    items: Sequence[Item], roles: Roles, max_tokens: int, held: float | None = None
) -> list[list[Item]]:
    """Group items so that no role's stream, shared contexts once, exceeds `max_tokens`.

    Neighbours with the same contexts stay together where they fit; else they are split, into
    batches that follow each other, and each part runs the contexts again, or reads what is kept of
    them: then each token of the first role's context counts `held` tokens more, which is what its
    keys, values and their gradients take (None: nothing is kept). The batches are as few as
    first-fit finds. A single item that is longer than `max_tokens` gets a batch of its own.
    """
    whole: list[tuple[list[Item], list[int]]] = []
    batches: list[tuple[list[Item], list[int]]] = []
    for _, neighbours in groupby(items, lambda item: [role.context for role in roles(item)]):
        group = list(neighbours)
        cost = stream_tokens(group, roles)
        if max(cost) <= max_tokens:
            whole.append((group, cost))
        else:
            batches += _split(group, roles, max_tokens, held)
    for group, cost in sorted(whole, key=lambda entry: -max(entry[1])):
        for batch, used in batches:
            if all(u + c <= max_tokens for u, c in zip(used, cost, strict=True)):
                batch += group
                used[:] = [u + c for u, c in zip(used, cost, strict=True)]
                break
        else:
            batches.append((group, cost))
    return [batch for batch, _ in batches]


def shares(items: Sequence[Item], roles: Roles, count: int) -> list[list[Item]]:
    """The items in `count` shares of about as many tokens, for as many processes.

    Neighbours with the same contexts stay together, unless they are more than a fair share.
    """
    if count == 1 or not items:
        return [list(items), *([] for _ in range(count - 1))]
    groups = [
        list(group) for _, group in groupby(items, lambda i: [role.context for role in roles(i)])
    ]
    fair = sum(max(stream_tokens(group, roles)) for group in groups) // count
    pieces = [piece for group in groups for piece in _split(group, roles, fair, None)]
    shared: list[list[Item]] = [[] for _ in range(count)]
    loads = [0] * count
    for piece, cost in sorted(pieces, key=lambda entry: -max(entry[1])):
        least = loads.index(min(loads))
        shared[least] += piece
        loads[least] += max(cost)
    return shared


def _split(
    group: list[Item], roles: Roles, max_tokens: int, held: float | None
) -> list[tuple[list[Item], list[int]]]:
    """Items of one context in parts that fit, each an item at least, with their streams' tokens."""
    extra = 0
    if held is not None and keepable(group, roles, max_tokens, held):
        extra = ceil(held * len(roles(group[0])[0].context))
    parts: list[tuple[list[Item], list[int]]] = []
    for item in group:
        if parts:
            cost = _held_tokens([*parts[-1][0], item], roles, extra)
            if max(cost) <= max_tokens:
                parts[-1] = [*parts[-1][0], item], cost
                continue
        parts.append(([item], _held_tokens([item], roles, extra)))
    return parts


def keepable(group: Sequence[Item], roles: Roles, max_tokens: int, held: float) -> bool:
    """Whether what is kept of the first role's context leaves room for each rollout."""
    context = len(roles(group[0])[0].context)
    longest = max(len(roles(item)[0].rollout) for item in group)
    return context * (1 + held) + longest - 1 <= max_tokens


def _held_tokens(items: Sequence[Item], roles: Roles, extra: int) -> list[int]:
    first, *others = stream_tokens(items, roles)
    return [first + extra, *others]


def stream_tokens(items: Sequence[Item], roles: Roles) -> list[int]:
    """Tokens that run for each role: neighbours' common context once, and no last tokens."""
    streams = zip(*(roles(item) for item in items), strict=True)
    return [
        sum(
            len(context) + sum(len(sequence.rollout) - 1 for sequence in rest)
            for context, rest in groupby(stream, _context)
        )
        for stream in streams
    ]
