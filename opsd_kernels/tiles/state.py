"""The state of each token while its vocabulary is swept, tile by tile.

A state is a tensor [rows, n] of the tiles' dtype, one column a token, columns contiguous. Every
tile adds to it, so that a row may come in one piece, tile by tile, or in shards on several ranks
that are combined by `merge_` and a plain sum.

The normaliser of a role has three rows, for logits z over the entries seen so far:

    MAX     m = max z (-inf before the first tile)
    REST    sum exp(z - m) - 1: without the largest entry (-1 before the first tile)
    MOMENT  sum exp(z - m) (m - z)

so that log p = (z - m) - log(1 + REST), and the entropy log(1 + REST) + MOMENT / (1 + REST) is a
sum of two numbers that are not negative: nothing cancels. REST does not include the 1, next to
which the small rest of a peaked distribution would be lost.
"""

import torch
from torch import Tensor

MAX, REST, MOMENT = range(3)

# The state of a divergence: both normalisers, and the sums that need them. The unnormalised
# gradient p is that by log S, from which that by the logit follows: dD/dz = p - S sum p, with
#     forward_kl   p = -T            (sum p = -1)
#     reverse_kl   p = S (log S - log T)
#     jsd          p = (1-b) S (log S - log M)
STUDENT, TEACHER = slice(0, 3), slice(3, 6)
DIVERGENCE = 6  # sum of the terms l, each made non-negative (csrc/divergence.h: `Entry`)
UNNORMALISED = 7  # sum p
# With the entry clip only, m = [l <= threshold]:
CLIPPED = 8  # sum min(l, threshold)
COUNT = 9  # sum (1 - m)
CLIPPED_UNNORMALISED = 10  # sum of the clipped one: -m T, m (p + S), m p
SUMS = slice(DIVERGENCE, CLIPPED_UNNORMALISED + 1)  # what `sums` adds to
DOT = 11  # sum of (clipped gradient) (unclipped gradient)
TARGET_WEIGHT = 12  # weight of the target's log-probability ÷ weight of the divergence (or 0)
ROWS = 13

# The state of a log-probability: one normaliser, and
TARGET = 3  # the target's logit, from the tile that holds it
LOG_PROB_ROWS = 4


def new(n_tokens: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The state of a divergence before the first tile."""
    state = like.new_zeros((ROWS, n_tokens), dtype=dtype)
    for role in (STUDENT, TEACHER):
        _begin(state[role])
    return state


def new_log_prob(n_tokens: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The state of a log-probability before the first tile."""
    state = like.new_zeros((LOG_PROB_ROWS, n_tokens), dtype=dtype)
    _begin(state[STUDENT])
    return state


def _begin(normaliser: Tensor) -> None:
    """Initialise a normaliser that has seen no entries."""
    normaliser[MAX] = -torch.inf
    normaliser[REST] = -1.0


def merge_(normaliser: Tensor, other: Tensor) -> None:
    """Merge `other` [3, n] into `normaliser` [3, n]."""
    most = torch.maximum(normaliser[MAX], other[MAX])
    sums = referred(normaliser, most) + referred(other, most)
    normaliser[MAX] = most
    set_sums_(normaliser, sums)


def referred(normaliser: Tensor, most: Tensor) -> Tensor:
    """The sums [3, n] of `normaliser` relative to a new maximum `most` [n], to be added up: the
    number of entries equal to it, the sum of the others, and the moment.
    """
    shift = most - normaliser[MAX]
    factor, total = torch.exp(-shift), 1.0 + normaliser[REST]
    largest = shift == 0
    sums = torch.stack(
        (
            largest.to(total.dtype),
            torch.where(largest, normaliser[REST], total * factor),
            (normaliser[MOMENT] + total * shift) * factor,
        )
    )
    # If nothing or only -inf was seen, the maximum is -inf and the differences are NaN.
    return sums.masked_fill_(normaliser[MAX] == -torch.inf, 0.0)


def set_sums_(normaliser: Tensor, sums: Tensor) -> None:
    """Set REST and MOMENT from the added sums of `referred`."""
    normaliser[REST] = (sums[0] - 1.0) + sums[1]
    normaliser[MOMENT] = sums[2]


def log_sum(normaliser: Tensor) -> Tensor:
    """[3, n] -> log sum exp(z - m) [n]."""
    return normaliser[REST].log1p()


def entropy(normaliser: Tensor) -> Tensor:
    """[3, n] -> nats [n]."""
    return log_sum(normaliser) + normaliser[MOMENT] / (1.0 + normaliser[REST])
