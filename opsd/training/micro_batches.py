"""Samples into micro-batches, padded or packed, and into shares for several processes."""

from collections.abc import Sequence
from itertools import groupby
from math import ceil

from opsd.prefix.rollout_states import Item, Roles, _context


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
