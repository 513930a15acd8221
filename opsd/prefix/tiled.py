"""Attention over a packed stream, tile by tile, exact. Backward recomputes the tiles.

A tile is some queries and all the keys that they see, so its softmax over [prefix ; own] is the
whole softmax: nothing has to be merged, and scores are freed with their tile. A tile is small
enough for the CPU's cache. Its segments have similar lengths, so that one batched matmul computes
many short ones. On a CPU, batched matmuls and torch's softmax are faster than torch's fused
attention, whose backward is slow.

Legend: T tokens, H query heads, K key heads, r = H / K, d head width; B pieces in a tile, Lq and Lk
its padded query and key lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from opsd.prefix.layout import Layout, Scores, Segment, Span, positions_of

TILE_SCORES = 1 << 20
"""The most attention scores, over all heads, in a tile: a few MB, so that they stay in cache.

With a backward, which holds two such tiles, half as many: 5 to 15 % faster on one core.
"""

GPU_TILE_SCORES = 1 << 26
"""The same on a GPU, where launches cost more than a cache saves."""

TILE_COST = 1 << 16
"""Scores that take as long as a tile's overhead: merging tiles is worth as much padding."""


@dataclass(frozen=True)
class Piece:
    """Consecutive query rows and the spans of rows that they attend to, in order of position."""

    queries: Span
    keys: tuple[Span, ...]

    @property
    def key_length(self) -> int:
        """The number of key rows."""
        return sum(span.length for span in self.keys)


@dataclass
class Tile:
    """B pieces in one batch, padded to Lq queries and Lk keys."""

    pieces: list[Piece]
    window: int | None
    device: torch.device
    masks: dict[torch.dtype, tuple[int, Tensor]] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """B, Lq, Lk."""
        pieces = self.pieces
        longest = max(piece.queries.length for piece in pieces)
        return len(pieces), longest, max(piece.key_length for piece in pieces)

    @cached_property
    def query_rows(self) -> Tensor:
        """The row in the stream of each query: [B · Lq], padded with row 0."""
        return self._rows([(piece.queries,) for piece in self.pieces], self.shape[1])

    @cached_property
    def key_rows(self) -> Tensor:
        """The row of each key: [B · Lk], padded with row 0."""
        return self._rows([piece.keys for piece in self.pieces], self.shape[2])

    def mask(self, dtype: torch.dtype) -> tuple[int, Tensor]:
        """0 where a query sees a key, else -inf: [B, 1, 1, Lq, ≤ Lk]; and the number of the first
        key that it is about, before which every query sees all: of a long prefix a mask would hold
        more than its keys. A padded query sees all."""
        if dtype not in self.masks:
            count, width, depth = self.shape
            queries = torch.full((count, width, 1), 1 << 60)
            keys = torch.full((count, 1, depth), 1 << 50)
            for row, piece in enumerate(self.pieces):
                queries[row, : piece.queries.length, 0] = positions_of([piece.queries])
                keys[row, 0, : piece.key_length] = positions_of(piece.keys)
            # A piece's last keys are its own queries', of which the first sees only its own.
            seen = min(piece.key_length - piece.queries.length + 1 for piece in self.pieces)
            first = seen if self.window is None else 0
            keys = keys[..., first:]
            hidden = keys > queries
            if self.window is not None:
                hidden |= queries - keys >= self.window
            hidden &= queries < 1 << 60
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
            self.masks[dtype] = first, mask[:, None, None].to(self.device)
        return self.masks[dtype]

    def _rows(self, lists: Sequence[Sequence[Span]], width: int) -> Tensor:
        rows = torch.zeros(len(lists), width, dtype=torch.long)
        for row, spans in enumerate(lists):
            taken = torch.cat([torch.arange(s.start, s.start + s.length) for s in spans])
            rows[row, : len(taken)] = taken
        return rows.flatten().to(self.device)


def tiles(layout: Layout, heads: int, window: int | None, backward: bool = False) -> list[Tile]:
    """Make the stream's tiles for `heads` query heads and a sliding window (in positions)."""

    def make() -> list[Tile]:
        scores = GPU_TILE_SCORES if layout.device.type == "cuda" else TILE_SCORES
        scores = scores // (2 * heads if backward else heads)
        pieces = [p for s in layout.segments for p in _pieces(layout, s, scores, window)]
        merged = _merge(pieces, scores, TILE_COST // heads)
        return [Tile(tile, window, layout.device) for tile in merged]

    return layout.once(("tiles", heads, window, backward), make)


def _pieces(layout: Layout, segment: Segment, scores: int, window: int | None) -> list[Piece]:
    """Cut the segment's queries into pieces of at most about `scores` scores a head."""
    row_span = segment.queries
    visible = row_span.end
    if window is not None:
        visible = min(visible, row_span.length + window)
    rows = min(row_span.length, max(16, scores // visible))
    pieces = []
    for begin in range(0, row_span.length, rows):
        length = min(rows, row_span.length - begin)
        queries = Span(row_span.start + begin, length, row_span.position + begin)
        own = layout.key_rows(Span(row_span.start, begin + length, row_span.position))
        first = 0 if window is None else max(0, queries.position - window + 1)
        spans = [span.since(first) for span in (*segment.before, own) if span.end > first]
        pieces.append(Piece(queries, tuple(spans)))
    return pieces


def _merge(pieces: list[Piece], scores: int, spare: int) -> list[list[Piece]]:
    """Merge pieces of similar shape, as long as padding costs less than another tile."""
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


def tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scores: Scores
) -> Tensor:
    """`opsd.prefix.attention.packed_attention` on any device, in any dtype."""
    # Scale before rounding. Autograd computes the gradient of both steps.
    query = (query * scores.scale).to(value.dtype)
    given = (query, key, value, scores.sinks)
    backward = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    cut = tiles(layout, query.shape[1], scores.window, backward)
    return _TiledAttention.apply(*given, cut, scores.softcap)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, tiles, softcap):
        ctx.save_for_backward(query, key, value, sinks)
        ctx.tiles, ctx.softcap = tiles, softcap
        out = query.new_empty(*query.shape[:2], value.shape[2])
        for tile in tiles:  # now: a mask between freed scores would keep their pages from others
            tile.mask(query.dtype)
        for tile in reversed(tiles):  # the largest first: the others take its memory
            q, k, v = _gather(tile, query, key, value)
            probability, _ = _probabilities(tile, q, k, softcap, sinks)
            _scatter(tile, torch.bmm(probability.to(v.dtype), v), out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        query, key, value, sinks = ctx.saved_tensors
        d_query = torch.empty_like(query)
        # A prefix gets gradients from all its rollouts.
        d_key = torch.zeros_like(key, dtype=_sum_dtype(key))
        d_value = torch.zeros_like(value, dtype=_sum_dtype(value))
        d_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=_sum_dtype(sinks))
        d_out = d_out.to(query.dtype)
        for tile in ctx.tiles:
            q, k, v = _gather(tile, query, key, value)
            probability, slope = _probabilities(tile, q, k, ctx.softcap, sinks)
            d_o = _heads(_padded_queries(tile, d_out), key.shape[1])
            _collect(tile, torch.bmm(probability.to(v.dtype).transpose(1, 2), d_o), d_value)
            d_probability = torch.bmm(d_o, v.transpose(1, 2)).to(probability.dtype)
            if d_sinks is not None:
                # The sink's probability is taken from the keys; a padded query has no gradient.
                taken = (1 - probability.sum(-1)) * (d_probability * probability).sum(-1)
                d_sinks -= _by_head(tile, taken, len(sinks)).sum((0, 2))
            d_score = torch._softmax_backward_data(
                d_probability, probability, -1, probability.dtype
            )
            if slope is not None:
                d_score *= slope
            d_score = d_score.to(q.dtype)
            _scatter(tile, torch.bmm(d_score, k), d_query)
            _collect(tile, torch.bmm(d_score.transpose(1, 2), q), d_key)
        if d_sinks is not None:
            d_sinks = d_sinks.to(sinks.dtype)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_sinks, None, None


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _probabilities(
    tile: Tile, q: Tensor, k: Tensor, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The softmax of the masked scores, fp32 [B·K, r·Lq, Lk]; and the softcap's slope at each."""
    count, width, depth = tile.shape
    scores, slope = torch.bmm(q, k.transpose(1, 2)), None
    if softcap is not None:
        squashed = torch.tanh_(scores / softcap)
        scores, slope = squashed * softcap, 1 - squashed * squashed
    first, mask = tile.mask(scores.dtype)
    scores.view(count, k.shape[0] // count, -1, width, depth)[..., first:].add_(mask)
    # fp32 is also faster: torch's softmax of short bf16 rows takes 2.5 times as long.
    probability = torch.softmax(scores, -1, dtype=_sum_dtype(scores))
    if sinks is not None:
        total = scores.to(probability.dtype).logsumexp(-1)
        kept = torch.sigmoid(_by_head(tile, total, len(sinks)) - sinks[:, None])
        probability *= kept.reshape(*total.shape, 1)
    return probability, slope


def _by_head(tile: Tile, rows: Tensor, heads: int) -> Tensor:
    """[B·K, r·Lq] → [B, H, Lq]."""
    return rows.view(tile.shape[0], heads, tile.shape[1])


def _gather(tile: Tile, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """The tile's q [B·K, r·Lq, d], k [B·K, Lk, d] and v [B·K, Lk, d_v]."""
    heads = key.shape[1]
    if len(tile.pieces) == 1:  # without the rows' numbers, of which a long prefix has many
        (piece,) = tile.pieces
        rows = (piece.queries,), piece.keys, piece.keys
        taken = [_spans(x, each) for x, each in zip((query, key, value), rows, strict=True)]
    else:
        numbers = tile.query_rows, tile.key_rows, tile.key_rows
        taken = [
            x.index_select(0, each).unflatten(0, (len(tile.pieces), -1))
            for x, each in zip((query, key, value), numbers, strict=True)
        ]
    return tuple(_heads(x, heads) for x in taken)


def _spans(rows: Tensor, spans: Sequence[Span]) -> Tensor:
    """The spans of `rows` [N, …] after each other, [1, L, …]; a view if they stand so."""
    first, length = spans[0].start, sum(span.length for span in spans)
    if all(a.start + a.length == b.start for a, b in pairwise(spans)):
        return rows[None, first : first + length]
    return torch.cat([rows[span.start : span.start + span.length] for span in spans])[None]


def _heads(rows: Tensor, heads: int) -> Tensor:
    """[B, L, r·K, d] → [B·K, r·L, d]."""
    count, length, all_heads, width = rows.shape
    rows = rows.view(count, length, heads, all_heads // heads, width).permute(0, 2, 3, 1, 4)
    return rows.reshape(count * heads, -1, width)


def _rows(tile: Tile, batched: Tensor, length: int) -> Tensor:
    """[B·K, r·L, d] → [B, L, K, r, d], a view."""
    count, width = tile.shape[0], batched.shape[-1]
    rows = batched.view(count, batched.shape[0] // count, -1, length, width)
    return rows.permute(0, 3, 1, 2, 4)


def _padded_queries(tile: Tile, rows: Tensor) -> Tensor:
    """The tile's rows [B, Lq, H, d], with zeros where a piece is shorter."""
    count, width, _ = tile.shape
    padded = rows.new_zeros(count, width, *rows.shape[1:])
    for target, piece in zip(padded, tile.pieces, strict=True):
        span = piece.queries
        target[: span.length] = rows[span.start : span.start + span.length]
    return padded


def _scatter(tile: Tile, batched: Tensor, out: Tensor) -> None:
    """Write the tile's queries [B·K, r·Lq, d] to their rows of `out` [T, H, d]."""
    rows = _rows(tile, batched, tile.shape[1])
    out = out.unflatten(1, rows.shape[2:4])
    for source, piece in zip(rows, tile.pieces, strict=True):
        span = piece.queries
        out[span.start : span.start + span.length] = source[: span.length]


def _collect(tile: Tile, batched: Tensor, total: Tensor) -> None:
    """Add the tile's keys [B·K, Lk, d] to their rows of `total` [T, K, d]."""
    rows = _rows(tile, batched, tile.shape[2])
    total = total.unflatten(1, rows.shape[2:4])
    for source, piece in zip(rows, tile.pieces, strict=True):
        begin = 0
        for span in piece.keys:
            total[span.start : span.start + span.length] += source[begin : begin + span.length]
            begin += span.length
