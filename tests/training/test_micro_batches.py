"""Packing loses nothing, doubles nothing and keeps to its budget, whatever it is given."""

from math import ceil

import torch
from hypothesis import given
from hypothesis import strategies as st

from opsd.objectives import Sample, SampleGroup, samples_of
from opsd.prefix import CachedPrefix
from opsd.prefix.layout import Layout
from opsd.training.micro_batches import (
    cache_prefixes,
    has_room,
    packed_batches,
    padded_batches,
    shares,
    stream_tokens,
)


@st.composite
def sample_groups(draw) -> list[SampleGroup]:
    """Groups with no teacher, one teacher context, or several."""
    ids = st.lists(st.integers(0, 3), min_size=1, max_size=5)
    teachers = draw(st.integers(0, 3))
    groups = []
    for _ in range(draw(st.integers(0, 6))):
        rollouts = draw(st.lists(ids, min_size=1, max_size=5))
        contexts = [draw(ids) for _ in range(teachers)]
        numbers = st.integers(0, max(teachers - 1, 0))
        samples = [Sample(rollout, 1.0, teacher=draw(numbers)) for rollout in rollouts]
        groups.append(SampleGroup(draw(ids), samples, contexts))
    return groups


def assert_all(groups, batches):
    """The batches hold every sample once, in its own contexts."""
    wanted = {id(s): (id(g.student), g.teachers) for g in groups for s in g.samples}
    found = [(id(s), g) for batch in batches for g in batch for s in g.samples]
    assert sorted(key for key, _ in found) == sorted(wanted)
    assert all(wanted[key] == (id(g.student), g.teachers) for key, g in found)


@given(sample_groups(), st.integers(1, 40), st.none() | st.floats(0.0, 2.0))
def test_packed_batches(groups, budget, cached_cost):
    batches = packed_batches(groups, budget, cached_cost)
    assert_all(groups, batches)
    pieces = {id(s): piece for g in groups for piece in g.by_teacher() for s in piece.samples}
    for batch in batches:
        assert batch
        (student, teacher), split = stream_tokens(batch), {}
        samples = samples_of(batch)
        for sample in samples:
            piece = pieces[id(sample)]
            if max(stream_tokens([piece])) <= budget:
                assert all(any(other is s for s in samples) for other in piece.samples)
            else:  # a part of it; what is cached of its context counts
                split[id(piece)] = piece
        assert len(split) <= 1
        for piece in split.values():
            if cached_cost is not None and has_room([piece], budget, cached_cost):
                student += ceil(cached_cost * len(piece.student))
        assert max(student, teacher) <= budget or len(samples) == 1


@given(sample_groups(), st.integers(1, 40))
def test_padded_batches(groups, budget):
    batches = padded_batches(groups, budget)
    assert_all(groups, batches)
    for batch in batches:
        longest = max(group.longest() for group in batch)
        assert len(batch) == 1 or longest * len(batch) <= budget


@given(sample_groups(), st.integers(1, 5))
def test_shares(groups, count):
    parts = shares(groups, count)
    assert len(parts) == count
    assert_all(groups, parts)


@given(sample_groups(), st.integers(1, 40), st.none() | st.floats(0.0, 2.0))
def test_a_prefix_is_cached_only_if_consecutive_batches_share_it(groups, budget, cached_cost):
    before = packed_batches(groups, budget, cached_cost)
    after, cache = cache_prefixes(before, budget, cached_cost)
    numbers = {}  # of each context, the batches that have it
    for number, batch in enumerate(before):
        for group in batch:
            for context in (group.student, *group.teachers_of(group.samples)):
                numbers.setdefault(id(context), set()).add(number)
    for old, new in zip(before, after, strict=True):
        for a, b in zip(old, new, strict=True):
            contexts = zip((a.student, *a.teachers), (b.student, *b.teachers), strict=True)
            for plain, context in contexts:
                found = sorted(numbers.get(id(plain), ()))
                wanted = len(found) > 1 and len(found) == found[-1] - found[0] + 1
                assert isinstance(context, CachedPrefix) == (wanted and len(plain) > 1)
                assert list(context) == plain
    assert cached_cost is not None or not any(prefix.trains for prefix in cache.prefixes)


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
