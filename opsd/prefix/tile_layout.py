"""A packed stream's attention, cut into tiles: some queries and all the keys that they see.

A tile is small enough for the cache, and its segments are alike in length, so that one batched
matmul does many short ones.

Legend: B pieces in a tile, Lq and Lk its padded query and key lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from opsd.prefix.layout import Layout, Segment, Span, positions_of

TILE_SCORES = 1 << 20
"""Attention scores, over all heads, that a tile may hold: a few MB, so that they stay in cache.

Half as many where backward follows, which holds two such tiles: 5 to 15 % faster on one core.
"""

GPU_TILE_SCORES = 1 << 26
"""On a GPU, where a launch costs more than what stays in cache saves."""

TILE_COST = 1 << 16
"""Scores whose time a tile's operations cost by themselves: padding up to that is worth a merge."""


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
                queries[row, : piece.queries.length, 0] = positions_of([piece.queries])
                keys[row, 0, : piece.key_length] = positions_of(piece.keys)
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


def tiles(layout: Layout, heads: int, window: int | None, backward: bool = False) -> list[Tile]:
    """The stream's tiles for `heads` query heads and a sliding window (in positions)."""
    key = "tiles", heads, window, backward
    return layout.once(key, lambda: _tiles(layout, heads, window, backward))


def _tiles(layout: Layout, heads: int, window: int | None, backward: bool) -> list[Tile]:
    scores = GPU_TILE_SCORES if layout.device.type == "cuda" else TILE_SCORES
    scores = scores // (2 * heads if backward else heads)
    pieces = [p for s in layout.segments for p in _pieces(layout, s, scores, window)]
    merged = _merge(pieces, scores, TILE_COST // heads)
    return [Tile(tile, window, layout.device) for tile in merged]


def _pieces(layout: Layout, segment: Segment, scores: int, window: int | None) -> list[Piece]:
    """The segment's queries, cut so that a piece has about `scores` scores a head at most."""
    whole = segment.queries
    visible = whole.end if window is None else min(whole.end, whole.length + window)
    rows = min(whole.length, max(16, scores // visible))
    pieces = []
    for begin in range(0, whole.length, rows):
        length = min(rows, whole.length - begin)
        queries = Span(whole.start + begin, length, whole.position + begin)
        own = layout.key_rows(Span(whole.start, begin + length, whole.position))
        first = 0 if window is None else max(0, queries.position - window + 1)
        spans = [span.since(first) for span in (*segment.before, own) if span.end > first]
        pieces.append(Piece(queries, tuple(spans)))
    return pieces


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
