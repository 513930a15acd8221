"""Divides groups into micro-batches, packed or padded, and into equal shares for processes."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest
from math import ceil

from opsd.objectives import SampleGroup, samples_of
from opsd.objectives.groups import as_student, as_teacher
from opsd.prefix import CachedPrefix, Group, Ids, PrefixCache


class StreamTokens(tuple[int, ...]):
    """The number of tokens in each role's stream: the student's, then each teacher's."""

    @property
    def student(self) -> int:
        """The student's tokens."""
        return self[0]

    @property
    def teacher(self) -> int:
        """The sum of all teachers' tokens."""
        return sum(self[1:])

    def plus(self, other: "StreamTokens") -> "StreamTokens":
        """Add both, role by role."""
        return StreamTokens(map(sum, zip_longest(self, other, fillvalue=0)))


def stream_tokens(groups: Sequence[SampleGroup], padded: bool = False) -> StreamTokens:
    """Count the tokens of shared streams: each context once, and no rollout's last token. padded:
    the student runs each rollout in a padded row of its own."""
    student, *teachers = _roles(groups)
    rows = [len(prefix) + len(r) - 1 for prefix, rollouts in student for r in rollouts]
    own = len(rows) * max(rows) if padded else _stream(student)
    return StreamTokens([own, *map(_stream, teachers)])


def separate_tokens(groups: Sequence[SampleGroup]) -> StreamTokens:
    """Count the tokens if each rollout ran with its own copy of the context."""
    alone = ([(p, [r]) for p, rollouts in role for r in rollouts] for role in _roles(groups))
    return StreamTokens(map(_stream, alone))


def _roles(groups: Sequence[SampleGroup]) -> list[list[Group]]:
    members = max((len(group.coefficients) for group in groups), default=1)
    return [as_student(groups), *(as_teacher(groups, number) for number in range(members))]


def _stream(groups: Iterable[Group]) -> int:
    return sum(len(prefix) + sum(len(r) - 1 for r in rollouts) for prefix, rollouts in groups)


def padded_batches(groups: Sequence[SampleGroup], max_tokens: int) -> list[list[SampleGroup]]:
    """Make batches of single samples in which no padded role exceeds `max_tokens`.

    Samples of similar length are together. One longer than `max_tokens` gets its own batch.
    """
    pieces = [group.of([sample]) for group in groups for sample in group.samples]
    batches: list[list[SampleGroup]] = []
    for piece in sorted(pieces, key=SampleGroup.longest):
        if batches and piece.longest() * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(piece)
        else:
            batches.append([piece])
    return batches


def packed_batches(
    groups: Sequence[SampleGroup],
    max_tokens: int,
    cached_cost: float | None = None,
    padded: bool = False,
) -> list[list[SampleGroup]]:
    """Make batches in which no role's stream exceeds `max_tokens`, as few as first-fit finds.

    A group stays whole if it fits; otherwise it is split over consecutive batches. Each of them
    runs its contexts again, or reads them from a prefix cache. With a cache, each token of the
    student's context counts as `cached_cost` more tokens (None: no cache). A sample longer than
    `max_tokens` gets a batch of its own.

    Samples in different teacher contexts are packed independently. padded: as in `stream_tokens`.
    """
    fitting: list[tuple[SampleGroup, StreamTokens]] = []
    batches: list[tuple[list[SampleGroup], StreamTokens]] = []
    for piece in (piece for group in groups for piece in group.by_teacher()):
        tokens = stream_tokens([piece], padded)
        if max(tokens) <= max_tokens:
            fitting.append((piece, tokens))
        else:
            for part, part_tokens in _split(piece, max_tokens, cached_cost, padded):
                batches.append(([part], part_tokens))
    for piece, tokens in sorted(fitting, key=lambda entry: -max(entry[1])):
        for number, (batch, used) in enumerate(batches):
            both = stream_tokens([*batch, piece], True) if padded else used.plus(tokens)
            if max(both) <= max_tokens:
                batches[number] = ([*batch, piece], both)
                break
        else:
            batches.append(([piece], tokens))
    return [_joined(batch) for batch, _ in batches]


def shares(groups: Sequence[SampleGroup], count: int) -> list[list[SampleGroup]]:
    """Divide the groups into `count` shares of about equally many tokens, one for each process.

    A group stays whole, unless it is larger than a fair share.
    """
    if count == 1 or not groups:
        return [list(groups), *([] for _ in range(count - 1))]
    pieces = [piece for group in groups for piece in group.by_teacher()]
    fair = sum(max(stream_tokens([piece])) for piece in pieces) // count
    parts = [part for piece in pieces for part in _split(piece, fair, None)]
    shared: list[list[SampleGroup]] = [[] for _ in range(count)]
    loads = [0] * count
    for part, tokens in sorted(parts, key=lambda entry: -max(entry[1])):
        least = loads.index(min(loads))
        shared[least].append(part)
        loads[least] += max(tokens)
    return [_joined(share) for share in shared]


def cache_prefixes(
    batches: Sequence[Sequence[SampleGroup]], max_tokens: int, cached_cost: float | None
) -> tuple[list[list[SampleGroup]], PrefixCache]:
    """Replace each context that the batches split by a cached prefix. Returns batches and cache.

    A prefix is cached only if consecutive batches share it. The student's is cached with its
    gradient only if there is room for it: see `packed_batches`.
    """
    contexts: dict[int, Ids] = {}
    numbers: dict[int, list[int]] = {}  # each context's batches, by number
    pieces: dict[int, list[SampleGroup]] = {}  # each student context's pieces
    for number, batch in enumerate(batches):
        for group in batch:
            pieces.setdefault(id(group.student), []).append(group)
            for context in (group.student, *group.teachers_of(group.samples)):
                contexts[id(context)] = context
                if number not in numbers.setdefault(id(context), []):
                    numbers[id(context)].append(number)
    cache, cached = PrefixCache(), {}
    for key, found in numbers.items():
        consecutive = found[-1] - found[0] == len(found) - 1
        if len(found) > 1 and consecutive and len(contexts[key]) > 1:
            trains = cached_cost is not None and key in pieces
            trains = trains and has_room(pieces[key], max_tokens, cached_cost)
            cached[key] = cache.add(contexts[key], trains, found[-1])
    return [[_with_cached(group, cached) for group in batch] for batch in batches], cache


def has_room(pieces: Sequence[SampleGroup], max_tokens: int, cached_cost: float) -> bool:
    """Whether the cached context of these pieces of one group leaves room for each rollout."""
    longest = max(sample.tokens for sample in samples_of(pieces))
    return len(pieces[0].student) * (1 + cached_cost) + longest - 1 <= max_tokens


def _with_cached(group: SampleGroup, cached: dict[int, CachedPrefix]) -> SampleGroup:
    def prefix(context: Ids) -> Ids:
        return cached.get(id(context), context)

    teachers = [prefix(context) for context in group.teachers]
    return replace(group, student=prefix(group.student), teachers=teachers)


def _split(
    group: SampleGroup, max_tokens: int, cached_cost: float | None, padded: bool = False
) -> list[tuple[SampleGroup, StreamTokens]]:
    """Split the group into pieces that fit, of at least one sample; with their token counts."""
    cached = StreamTokens()
    if cached_cost is not None and has_room([group], max_tokens, cached_cost):
        cached = StreamTokens([ceil(cached_cost * len(group.student))])
    pieces: list[tuple[SampleGroup, StreamTokens]] = []
    for sample in group.samples:
        if pieces:
            longer = group.of([*pieces[-1][0].samples, sample])
            tokens = stream_tokens([longer], padded).plus(cached)
            if max(tokens) <= max_tokens:
                pieces[-1] = longer, tokens
                continue
        piece = group.of([sample])
        pieces.append((piece, stream_tokens([piece], padded).plus(cached)))
    return pieces


def _joined(pieces: Sequence[SampleGroup]) -> list[SampleGroup]:
    """Join neighbouring pieces of the same group."""
    joined: list[SampleGroup] = []
    for piece in pieces:
        if joined and piece.is_piece_with(joined[-1]):
            joined[-1] = piece.of([*joined[-1].samples, *piece.samples])
        else:
            joined.append(piece)
    return joined
