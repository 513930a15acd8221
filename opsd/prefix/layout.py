"""Where each token of a packed stream stands, and which of them it may attend to.

A stream holds all prefixes, then all rollouts: [prefix 1 | prefix 2 | … | rollout 1.1 | …]. A
rollout's tokens attend to its prefix and causally to themselves; positions continue after the
prefix. Nothing is padded in the stream. For attention it is cut into `Tile`s: some query rows and
all the rows they may attend to, small enough for the cache, alike in length, so that one batched
matmul does many short segments. The rows of keys are the stream's, after those of a past that ran
in another stream, if there is one.

Legend: T tokens in the stream, B segments in a tile, Lq and Lk its padded query and key lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

Group = tuple[Tensor | Sequence[int], Sequence[Tensor | Sequence[int]]]
"""(prefix ids [P], [rollout ids [R_1], …])"""

TILE_SCORES = 1 << 20
"""Attention scores, over all heads, that a tile may hold: a few MB, so that they stay in cache."""

TILE_COST = 1 << 16
"""Scores whose time a tile's operations cost by themselves: padding up to that is worth a merge."""


@dataclass(frozen=True)
class Span:
    """Rows `start` to `start + length`, the first at `position` in its own sequence."""

    start: int
    length: int
    position: int

    @property
    def end(self) -> int:
        """The position after its last row."""
        return self.position + self.length


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of the stream, a prefix or a rollout, and the keys that come before."""

    queries: Span
    before: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Consecutive query rows and the spans of rows that they attend to, in order of position."""

    queries: Span
    keys: tuple[Span, ...]

    @property
    def key_length(self) -> int:
        """Rows attended to."""
        return sum(span.length for span in self.keys)


@dataclass
class Tile:
    """B pieces side by side, padded to Lq queries and Lk keys."""

    pieces: list[Piece]
    window: int | None
    device: torch.device
    masks: dict[torch.dtype, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """B, Lq, Lk."""
        pieces = self.pieces
        longest = max(piece.queries.length for piece in pieces)
        return len(pieces), longest, max(piece.key_length for piece in pieces)

    @cached_property
    def query_rows(self) -> Tensor:
        """The stream's row of each query: [B · Lq], padded with row 0."""
        return self._rows([(piece.queries,) for piece in self.pieces], self.shape[1])

    @cached_property
    def key_rows(self) -> Tensor:
        """The row of each key: [B · Lk], padded with row 0."""
        return self._rows([piece.keys for piece in self.pieces], self.shape[2])

    def mask(self, dtype: torch.dtype) -> Tensor:
        """0 where a query sees a key, else -inf: [B, 1, 1, Lq, Lk]. A padded query sees all."""
        if dtype not in self.masks:
            count, width, depth = self.shape
            queries = torch.full((count, width, 1), 1 << 60)
            keys = torch.full((count, 1, depth), 1 << 50)
            for row, piece in enumerate(self.pieces):
                queries[row, : piece.queries.length, 0] = _positions([piece.queries])
                keys[row, 0, : piece.key_length] = _positions(piece.keys)
            hidden = keys > queries
            if self.window is not None:
                hidden |= queries - keys >= self.window
            hidden &= queries < 1 << 60
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
            self.masks[dtype] = mask[:, None, None].to(self.device)
        return self.masks[dtype]

    def _rows(self, lists: Sequence[Sequence[Span]], width: int) -> Tensor:
        rows = torch.zeros(len(lists), width, dtype=torch.long)
        for row, spans in enumerate(lists):
            taken = torch.cat([torch.arange(s.start, s.start + s.length) for s in spans])
            rows[row, : len(taken)] = taken
        return rows.flatten().to(self.device)


def _positions(spans: Sequence[Span]) -> Tensor:
    return torch.cat([torch.arange(s.position, s.end) for s in spans])


def _from(span: Span, position: int) -> Span:
    """The span without what comes before `position`."""
    cut = max(0, position - span.position)
    return Span(span.start + cut, span.length - cut, span.position + cut)


class Layout:
    """The packed stream of some groups.

    Attributes:
        ids: [T], the prefixes and then the rollouts, each without its last token, which is only a
            target.
        positions: [T], of each token in its own sequence.
        predictors: [Σ R], the row whose hidden state predicts each rollout token.
    """

    def __init__(
        self, groups: Sequence[Group], device: torch.device, past: Sequence[int] | None = None
    ):
        """The layout of `groups` on `device`.

        `past`: for each group, how many tokens before its prefix have run elsewhere. Their keys,
        group by group, stand before the stream's own.
        """
        groups = checked_groups(groups)
        past = past or [0] * len(groups)
        self.past = sum(past)
        self.segments: list[Segment] = []
        start = kept = 0
        for (prefix, _), length in zip(groups, past, strict=True):
            before = (Span(kept, length, 0),) if length else ()
            self.segments.append(Segment(Span(start, len(prefix), length), before))
            start += len(prefix)
            kept += length
        predictors = []
        for parent, (_, rollouts) in zip(list(self.segments), groups, strict=True):
            before = (*parent.before, self._keys(parent.queries))
            for ids in rollouts:
                last = torch.tensor([parent.queries.start + parent.queries.length - 1])
                predictors += [last, torch.arange(start, start + len(ids) - 1)]
                if len(ids) > 1:
                    queries = Span(start, len(ids) - 1, parent.queries.end)
                    self.segments.append(Segment(queries, before))
                    start += len(ids) - 1
        ids = [prefix for prefix, _ in groups]
        ids += [ids[:-1] for _, rollouts in groups for ids in rollouts]
        self.ids = torch.cat(ids).to(device)
        self.positions = _positions([segment.queries for segment in self.segments]).to(device)
        self.predictors = torch.cat(predictors).to(device)
        self.device = device
        self._tiles: dict[tuple[int, int | None], list[Tile]] = {}

    def tiles(self, heads: int, window: int | None) -> list[Tile]:
        """The stream's tiles for `heads` query heads and a sliding window (in positions)."""
        key = heads, window
        if key not in self._tiles:
            pieces = [p for s in self.segments for p in self._pieces(s, heads, window)]
            merged = _merge(pieces, TILE_SCORES // heads, TILE_COST // heads)
            self._tiles[key] = [Tile(tile, window, self.device) for tile in merged]
        return self._tiles[key]

    def _keys(self, span: Span) -> Span:
        """The rows of the stream, as rows of keys."""
        return Span(span.start + self.past, span.length, span.position)

    def _pieces(self, segment: Segment, heads: int, window: int | None) -> list[Piece]:
        """The segment's queries, cut so that a piece has about TILE_SCORES scores at most."""
        whole = segment.queries
        visible = whole.end if window is None else min(whole.end, whole.length + window)
        rows = min(whole.length, max(16, TILE_SCORES // heads // visible))
        pieces = []
        for begin in range(0, whole.length, rows):
            length = min(rows, whole.length - begin)
            queries = Span(whole.start + begin, length, whole.position + begin)
            own = self._keys(Span(whole.start, begin + length, whole.position))
            first = 0 if window is None else max(0, queries.position - window + 1)
            spans = [_from(span, first) for span in (*segment.before, own) if span.end > first]
            pieces.append(Piece(queries, tuple(spans)))
        return pieces


def checked_groups(groups: Sequence[Group]) -> list[tuple[Tensor, list[Tensor]]]:
    """The groups as int64 tensors on the CPU. Raises ValueError for what cannot be a group."""
    groups = [(_ids(prefix), [_ids(ids) for ids in rollouts]) for prefix, rollouts in groups]
    if not groups:
        raise ValueError("groups is empty: it must hold (prefix ids, [rollout ids, …])")
    for number, (prefix, rollouts) in enumerate(groups):
        if not len(prefix):
            raise ValueError(f"groups[{number}] has an empty prefix: it must hold a token at least")
        if not len(rollouts) or not all(map(len, rollouts)):
            raise ValueError(
                f"groups[{number}] has rollouts of lengths {[len(ids) for ids in rollouts]}: it "
                "must have a rollout, and each a token at least"
            )
    return groups


def _ids(ids: Tensor | Sequence[int]) -> Tensor:
    ids = ids if isinstance(ids, Tensor) else torch.tensor(ids, dtype=torch.long)
    if ids.ndim != 1 or (len(ids) and (ids.is_floating_point() or ids.is_complex())):
        raise ValueError(
            f"groups holds a tensor of shape {tuple(ids.shape)} and dtype {ids.dtype}: ids must "
            "be integers in one dimension"
        )
    return ids.cpu().long()


def _merge(pieces: list[Piece], scores: int, spare: int) -> list[list[Piece]]:
    """Pieces of like shape together, as long as padding costs less than a tile of its own."""
    tiles: list[list[Piece]] = []
    width = depth = 0
    for piece in sorted(pieces, key=lambda p: (p.key_length, p.queries.length)):
        wider = max(width, piece.queries.length)
        deeper = max(depth, piece.key_length)
        own = piece.queries.length * piece.key_length
        if tiles:
            padded = (len(tiles[-1]) + 1) * wider * deeper
            before = len(tiles[-1]) * width * depth
            if padded <= scores and padded - before - own <= spare:
                tiles[-1].append(piece)
                width, depth = wider, deeper
                continue
        tiles.append([piece])
        width, depth = piece.queries.length, piece.key_length
    return tiles
