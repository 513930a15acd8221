"""Attention over a packed stream by flash attention for sequences of varying lengths.

With full attention nothing is copied. In one call each segment attends causally to itself. In
another, each group's rollouts, which are adjacent in the stream, attend to their whole prefix: its
"sequences" are the groups. The results are merged by their log-sum-exps: with l = log(e^l₁ + e^l₂),
out = e^(l₁-l) out₁ + e^(l₂-l) out₂. Each call's backward gets the merged out and l. So its
probabilities e^(score - l) are those of the whole softmax, and Σ out · d_out is the whole row's:
the gradients only have to be added.

With a sliding window a rollout sees only the last keys of its prefix. They are copied in front of
its own keys, and one causal call with the window computes everything.

This relies on conventions of flash attention. A causal query i of n sees the keys up to i + m - n
of its m: the last query sees the last key. A query without any key has out 0 and a log-sum-exp of
+inf (version 2) or -inf (version 3). Sequences may be empty.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from opsd.prefix.layout import Layout, Scores, Segment, Span


@dataclass(frozen=True)
class Part:
    """One call, in which the queries of sequence i see the keys of sequence i, all or causally.

    rows: the queries' rows in the stream. keys: the keys' rows, or the indices of rows to copy.
    query_starts, key_starts: the start of each sequence, and the end: [sequences + 1], int32.
    """

    rows: slice
    keys: slice | Tensor
    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_key: int
    causal: bool
    window: int | None = None


def parts(layout: Layout, window: int | None) -> list[Part]:
    """The calls whose merged results are the attention of the layout's stream."""
    segments = layout.segments
    if window is not None and window < max(s.queries.end for s in segments):
        return [_windowed(layout, window)]
    prefixes, rollouts = segments[: layout.groups], segments[layout.groups :]
    own = [_own(layout, segment) for segment in segments]
    found = [_part(layout, segments, own, causal=True)]
    for some in (prefixes, rollouts):
        for past in (True, False):
            # Keys of a past and of the stream are not adjacent, so each needs a call.
            seen = [
                next((span for span in s.before if (span.start < layout.past) == past), None)
                for s in some
            ]
            if any(seen):
                found.append(_part(layout, *_joined(some, seen), causal=False))
    return found


def _joined(
    segments: Sequence[Segment], spans: Sequence[Span | None]
) -> tuple[list[Segment], list[Span]]:
    """Join adjacent segments that see the same span. Keys between spans, which no segment sees,
    become a sequence without queries."""
    joined: list[Segment] = []
    seen: list[Span] = []
    end = next(span.start for span in spans if span)
    for segment, span in zip(segments, spans, strict=True):
        start, length = segment.queries.start, segment.queries.length
        if span is not None and seen and span == seen[-1]:
            before = joined[-1].queries
            joined[-1] = Segment(Span(before.start, before.length + length, before.position))
            continue
        if span is not None and span.start > end:
            joined.append(Segment(Span(start, 0, 0)))
            seen.append(Span(end, span.start - end, 0))
        joined.append(Segment(segment.queries))
        seen.append(span or Span(end, 0, 0))
        end = seen[-1].start + seen[-1].length
    return joined, seen


def _part(
    layout: Layout, segments: Sequence[Segment], keys: Sequence[Span], *, causal: bool
) -> Part:
    """Make the call for segments and spans that are adjacent, without gaps."""
    queries = [segment.queries for segment in segments]
    first, last = queries[0], queries[-1]
    return Part(
        slice(first.start, last.start + last.length),
        slice(keys[0].start, keys[-1].start + keys[-1].length),
        *_starts(layout, [q.length for q in queries], [k.length for k in keys]),
        causal,
    )


def _windowed(layout: Layout, window: int) -> Part:
    """Make the call for a window: each segment, with the earlier keys that its first query sees."""
    rows, lengths = [], []
    for segment in layout.segments:
        oldest = segment.queries.position - window + 1
        spans = [span.since(oldest) for span in segment.before if span.end > oldest]
        spans.append(_own(layout, segment))
        rows += [torch.arange(s.start, s.start + s.length) for s in spans]
        lengths.append(sum(s.length for s in spans))
    return Part(
        slice(0, len(layout.ids)),
        torch.cat(rows).to(layout.device),
        *_starts(layout, [s.queries.length for s in layout.segments], lengths),
        causal=True,
        window=window,
    )


def _own(layout: Layout, segment: Segment) -> Span:
    return layout.key_rows(segment.queries)


def _starts(layout: Layout, queries: list[int], keys: list[int]) -> tuple[Tensor, Tensor, int, int]:
    first, second = (
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(layout.device)
        for lengths in (queries, keys)
    )
    # At least 2: for 1, flash attention uses a decoding kernel, which allows no empty sequence.
    return first, second, max(2, *queries), max(keys)


Forward = Callable[..., tuple[Tensor, Tensor]]
"""(query, key, value, part, scores) → out, log-sum-exp [H, rows]"""

Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""(d_out, query, key, value, out, lse, part, scores) → d_query, d_key, d_value"""


@dataclass(frozen=True)
class Calls:
    """A library's forward and backward calls."""

    forward: Forward
    backward: Backward


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scores: Scores, *, calls: Calls
) -> Tensor:
    """`opsd.prefix.attention.packed_attention` by flash attention, on a GPU, in bf16 or fp16."""
    window = scores.window
    some = layout.once(("parts", window), lambda: parts(layout, window))
    return _Merged.apply(query.to(value.dtype), key, value, some, scores, calls)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, parts, scores, calls):
        out = lse = None
        for part in parts:
            part_out, part_lse = calls.forward(
                query[part.rows], key[part.keys], value[part.keys], part, scores
            )
            if out is None:  # the first call has all rows
                out, lse = part_out, part_lse
            else:
                _merge(out[part.rows], lse[:, part.rows], part_out, part_lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.parts, ctx.scores, ctx.calls = parts, scores, calls
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        query, key, value, out, lse = ctx.saved_tensors
        d_out = d_out.to(query.dtype).contiguous()
        d_query = torch.zeros_like(query)
        # A prefix gets gradients from all its rollouts, and a copied key from all its copies.
        d_key = torch.zeros_like(key, dtype=torch.float32)
        d_value = torch.zeros_like(value, dtype=torch.float32)
        for part in ctx.parts:
            rows, keys = part.rows, part.keys
            own = d_out[rows], query[rows], key[keys], value[keys], out[rows]
            row_lse = lse[:, rows].contiguous()
            dq, dk, dv = ctx.calls.backward(*own, row_lse, part, ctx.scores)
            d_query[rows] += dq
            for total, found in ((d_key, dk), (d_value, dv)):
                if isinstance(keys, slice):
                    total[keys] += found
                else:
                    total.index_add_(0, keys, found.to(total.dtype))
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None, None


def _merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge a call's out [rows, H, d] and log-sum-exp [H, rows] into those of earlier calls."""
    # +inf marks rows that see none of this call's keys.
    part_lse = part_lse.masked_fill(part_lse == torch.inf, -torch.inf)
    merged = torch.logaddexp(lse, part_lse)
    for_out = (torch.exp(lse - merged).T[..., None], torch.exp(part_lse - merged).T[..., None])
    out.copy_(out * for_out[0] + part_out * for_out[1])
    lse.copy_(merged)


def _left(part: Part) -> int:
    """The number of earlier keys that a query sees; -1: all."""
    return -1 if part.window is None else part.window - 1


def _torch_arguments(part: Part, scores: Scores) -> tuple[tuple, dict]:
    """The positional and the named arguments that forward and backward share."""
    assert scores.softcap is None
    places = part.query_starts, part.key_starts, part.longest_query, part.longest_key
    dropout = 0.0
    right = 0 if part.causal else -1
    names = {"window_size_left": _left(part), "window_size_right": right, "scale": scores.scale}
    return (*places, dropout, part.causal), names


def _torch_forward(query, key, value, part: Part, scores: Scores):
    places, names = _torch_arguments(part, scores)
    debug = False
    found = torch.ops.aten._flash_attention_forward(query, key, value, *places, debug, **names)
    return found[:2]


def _torch_backward(d_out, query, key, value, out, lse, part: Part, scores: Scores):
    places, names = _torch_arguments(part, scores)
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)  # a dropout's, unused
    unused = torch.empty(0, device=query.device)
    return torch.ops.aten._flash_attention_backward(
        d_out, query, key, value, out, lse, *places, seed, unused, **names
    )


TORCH = Calls(_torch_forward, _torch_backward)
"""torch's own flash attention."""


def _package_arguments(part: Part, scores: Scores) -> dict:
    return {
        "cu_seqlens_q": part.query_starts,
        "cu_seqlens_k": part.key_starts,
        "max_seqlen_q": part.longest_query,
        "max_seqlen_k": part.longest_key,
        "dropout_p": 0.0,
        "softmax_scale": scores.scale,
        "causal": part.causal,
        "window_size_left": _left(part),
        "window_size_right": 0 if part.causal else -1,
        "softcap": scores.softcap or 0.0,
        "alibi_slopes": None,
    }


def _package_forward(query, key, value, part: Part, scores: Scores):
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    return _flash_attn_varlen_forward(query, key, value, **_package_arguments(part, scores))[:2]


def _package_backward(d_out, query, key, value, out, lse, part: Part, scores: Scores):
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    found = tuple(map(torch.empty_like, (query, key, value)))
    options = _package_arguments(part, scores)
    _flash_attn_varlen_backward(
        d_out, query, key, value, out, lse, *found, **options, deterministic=False
    )
    return found


FLASH_ATTN = Calls(_package_forward, _package_backward)
"""The flash-attn package, 2.7 and later."""

_SHARED = {"cu_seqlens_q", "window_size_left", "softcap", "softmax_scale", "alibi_slopes"}
FLASH_ATTN_ARGUMENTS = {
    "_flash_attn_varlen_forward": _SHARED,
    "_flash_attn_varlen_backward": _SHARED | {"dq", "dk", "dv", "deterministic"},
}
"""The functions that are called, and arguments that a version needs to be supported."""
