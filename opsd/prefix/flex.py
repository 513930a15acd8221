"""Attention over a packed stream by FlexAttention: any width, dtype and soft cap, on a GPU.

The mask is a function of rows: a query sees its own segment and its group's shared keys, unless
they come after it or are outside the window. FlexAttention skips blocks in which no query sees any
key.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from opsd.prefix.layout import Layout, Scores, positions_of

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query row, key row) → whether that query sees that key."""

BLOCK = 128
"""Rows and columns of a block that FlexAttention computes or skips; its default."""

SHARED = -1
"""The segment number of keys that a whole group may see."""


def flex_packed_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scores: Scores
) -> Tensor:
    """`opsd.prefix.attention.packed_attention` by FlexAttention, which has no backward on a CPU."""
    window = scores.window
    heads_first = (x.transpose(0, 1)[None] for x in (query.to(value.dtype), key, value))
    # On a CPU it is not compiled: that would take longer than attention in the tests.
    attend: Any = _compiled() if query.is_cuda else flex_attention
    out = attend(
        *heads_first,
        score_mod=None if scores.softcap is None else _capped(scores.softcap),
        block_mask=layout.once(("flex", window), lambda: block_mask(layout, window)),
        scale=scores.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[0].transpose(0, 1)


def block_mask(layout: Layout, window: int | None) -> BlockMask:
    """Make the mask of the keys that each token sees.

    It is made BLOCK rows at a time: create_block_mask holds the mask of all tokens and all keys, a
    gigabyte for a stream of 32,000 tokens.
    """
    sees, tokens, keys = visible(layout, window), len(layout.ids), layout.past + len(layout.ids)
    columns, missing = torch.arange(keys, device=layout.device), -keys % BLOCK
    some, every = [], []
    for rows in torch.arange(tokens, device=layout.device).split(BLOCK):
        seen = sees(None, None, rows[:, None], columns[None])
        seen = nn.functional.pad(seen, (0, missing, 0, BLOCK - len(rows)))
        blocks = seen.unflatten(1, (-1, BLOCK))
        some.append(blocks.any(2).any(0))
        every.append(blocks.all(2).all(0))
    whole = torch.stack(every)
    return BlockMask.from_kv_blocks(
        *_listed(torch.stack(some) & ~whole),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(tokens, keys),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of blocks: the number of true ones, and all columns, true ones first."""
    first = blocks.to(torch.int32).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], first.to(torch.int32)[None, None]


def visible(layout: Layout, window: int | None) -> Mask:
    """The mask function of the layout's stream."""
    groups, segments, positions = (x.to(layout.device) for x in key_places(layout))
    past = layout.past

    def sees(batch, head, q, k):
        own = q + past
        shared = (segments[k] == SHARED) | (segments[k] == segments[own])
        distance = positions[own] - positions[k]
        found = (groups[k] == groups[own]) & shared & (distance >= 0)
        return found if window is None else found & (distance < window)

    return sees


def key_places(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Each key row's group, its rollout's number or SHARED, and its position in the sequence."""
    prefixes, rollouts = layout.segments[: layout.groups], layout.segments[layout.groups :]
    places = [(span, group, SHARED) for group, s in enumerate(prefixes) for span in s.before]
    places += [(s.queries, group, SHARED) for group, s in enumerate(prefixes)]
    parents = {layout.key_rows(s.queries): group for group, s in enumerate(prefixes)}
    places += [(s.queries, parents[s.before[-1]], number) for number, s in enumerate(rollouts)]
    spans = [span for span, _, _ in places]
    lengths = torch.tensor([span.length for span in spans])
    groups = torch.tensor([group for _, group, _ in places]).repeat_interleave(lengths)
    numbers = torch.tensor([number for _, _, number in places]).repeat_interleave(lengths)
    return groups, numbers, positions_of(spans)


@cache
def _compiled() -> Callable[..., Tensor]:
    # dynamic: otherwise each new length of a stream compiles again.
    return torch.compile(flex_attention, dynamic=True)


@cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    """The soft cap's function; cached, since FlexAttention compiles again for each new function."""

    def cap(score, batch, head, q, k):
        return softcap * torch.tanh(score / softcap)

    return cap
