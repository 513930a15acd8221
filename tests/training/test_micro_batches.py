"""Packing loses nothing, doubles nothing and keeps to its budget, whatever it is given."""

from dataclasses import dataclass
from math import ceil

import torch
from hypothesis import given
from hypothesis import strategies as st

from opsd.prefix.layout import Layout
from opsd.prefix.rollout_states import Scored
from opsd.training.micro_batches import (
    keepable,
    packed_batches,
    padded_batches,
    shares,
    stream_tokens,
)


@dataclass(frozen=True)
class Item:
    """A rollout in one or two roles, told apart from its equals by its number."""

    number: int
    roles: tuple[Scored, ...]


def roles(item: Item) -> tuple[Scored, ...]:
    return item.roles


@st.composite
def items(draw) -> list[Item]:
    """Rollouts of few contexts, so that neighbours share them; sometimes apart from each other."""
    count = draw(st.integers(1, 2))
    ids = st.lists(st.integers(0, 3), min_size=1, max_size=5)
    contexts = draw(st.lists(st.tuples(*[ids] * count), min_size=2, max_size=6))
    order = draw(st.lists(st.sampled_from(contexts), max_size=14))
    if draw(st.booleans()):
        order.sort()
    rollouts = [draw(ids) for _ in order]
    return [
        Item(number, tuple(Scored(context, rollout) for context in chosen))
        for number, (chosen, rollout) in enumerate(zip(order, rollouts, strict=True))
    ]


def numbers(batches: list[list[Item]]) -> list[int]:
    return sorted(item.number for batch in batches for item in batch)


@given(items(), st.integers(1, 40), st.none() | st.floats(0.0, 2.0))
def test_packed_batches(given, budget, held):
    batches = packed_batches(given, roles, budget, held)
    assert numbers(batches) == list(range(len(given)))
    contexts = [[role.context for role in item.roles] for item in given]
    whole = {}  # number -> those of all its neighbours with the same contexts
    for number, context in enumerate(contexts):
        if number and contexts[number - 1] == context:
            whole[number] = whole[number - 1]
        else:
            whole[number] = []
        whole[number].append(number)
    for batch in batches:
        assert batch
        tokens, split, extra = stream_tokens(batch, roles), set(), 0
        for item in batch:
            group = [given[k] for k in whole[item.number]]
            if max(stream_tokens(group, roles)) <= budget:
                assert all(other in batch for other in group)
            else:  # a part of it; what is kept of its context counts
                split.add(group[0].number)
                if held is not None and keepable(group, roles, budget, held):
                    extra = ceil(held * len(item.roles[0].context))
        assert len(split) <= 1
        tokens[0] += extra
        assert max(tokens) <= budget or len(batch) == 1


@given(items(), st.integers(1, 40))
def test_padded_batches(given, budget):
    batches = padded_batches(given, roles, budget)
    assert numbers(batches) == list(range(len(given)))
    for batch in batches:
        longest = max(len(role) for item in batch for role in item.roles)
        assert len(batch) == 1 or longest * len(batch) <= budget


@given(items(), st.integers(1, 5))
def test_shares(given, count):
    parts = shares(given, roles, count)
    assert len(parts) == count and numbers(parts) == list(range(len(given)))


GROUPS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 9), min_size=1, max_size=8),
        st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=8), min_size=1, max_size=4),
        st.integers(0, 5),
    ),
    min_size=1,
    max_size=5,
)


@given(GROUPS)
def test_layouts(groups):
    """Every token has a row, and each rollout token's predictor is the one before it."""
    past = [length for *_, length in groups]
    layout = Layout([group[:2] for group in groups], torch.device("cpu"), past)
    before, positions = [], []
    for prefix, rollouts, length in groups:
        for rollout in rollouts:
            before += [prefix[-1], *rollout[:-1]]
            positions += range(length + len(prefix) - 1, length + len(prefix) + len(rollout) - 1)
    assert layout.ids[layout.predictors].tolist() == before
    assert layout.positions[layout.predictors].tolist() == positions
    rows = [
        row
        for s in layout.segments
        for row in range(s.queries.start, s.queries.start + s.queries.length)
    ]
    assert rows == list(range(len(layout.ids)))
    assert len(rows) == sum(len(p) + sum(len(r) - 1 for r in rs) for p, rs, _ in groups)
    for segment in layout.segments:  # keys at every position before its own, once each
        keys = [k for span in segment.before for k in range(span.position, span.end)]
        assert keys == list(range(segment.queries.position))
