"""What is known of each token while its vocabulary is swept, tile by tile.

A state is a tensor [rows, n] of the tiles' dtype, one column a token, columns contiguous. Every
tile adds its part, so that the order is: the row whole, tile by tile, or shards on several ranks
that are combined by `merge_` and a plain sum.

The normaliser of a role has three rows, for logits z over the entries seen so far:

    MAX     m = max z (-inf before the first tile)
    SUM     sum exp(z - m)
    MOMENT  sum exp(z - m) (m - z)

so that log p = (z - m) - log SUM, and the entropy log SUM + MOMENT / SUM is a sum of two numbers
that are not negative: nothing cancels.
"""

import torch
from torch import Tensor

MAX, SUM, MOMENT = range(3)

# The state of a divergence: both normalisers, and the sums that need them. `pull` p is what the
# gradient is made of: dD/dz = p - S sum p, with
#     forward_kl   p = -T            (sum p = -1)
#     reverse_kl   p = S (log S - log T)
#     jsd          p = (1-b) S (log S - log M)
STUDENT, TEACHER = slice(0, 3), slice(3, 6)
DIVERGENCE = 6  # sum of the terms l
PULL = 7  # sum p
# With the entry clip only, m = [l <= threshold]:
CLIPPED = 8  # sum min(l, threshold)
COUNT = 9  # sum (1 - m)
CLIPPED_PULL = 10  # sum of the clipped pull: -m T, m (p + S), m p
SUMS = slice(DIVERGENCE, CLIPPED_PULL + 1)  # what `sums` adds to
DOT = 11  # sum of (clipped gradient) (unclipped gradient)
ROWS = 12

# The state of a log-probability: one normaliser, and
TARGET = 3  # the target's logit, from the tile that holds it
LOG_PROB_ROWS = 4


def new(n_tokens: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The state of a divergence before the first tile."""
    state = like.new_zeros((ROWS, n_tokens), dtype=dtype)
    state[STUDENT][MAX] = state[TEACHER][MAX] = -torch.inf
    return state


def new_log_prob(n_tokens: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The state of a log-probability before the first tile."""
    state = like.new_zeros((LOG_PROB_ROWS, n_tokens), dtype=dtype)
    state[MAX] = -torch.inf
    return state


def merge_(normaliser: Tensor, other: Tensor) -> None:
    """Into `normaliser` [3, n] goes what `other` [3, n] has seen."""
    most = torch.maximum(normaliser[MAX], other[MAX])
    rescale_(normaliser, most)
    other = other.clone()
    rescale_(other, most)
    normaliser[SUM:] += other[SUM:]


def rescale_(normaliser: Tensor, most: Tensor) -> None:
    """Refer the sums to the larger maximum `most` [n]."""
    shift = most - normaliser[MAX]
    factor = torch.exp(-shift)
    normaliser[MOMENT] += normaliser[SUM] * shift
    normaliser[SUM:] *= factor
    # Nothing seen, or nothing but -inf: the maximum was -inf and the differences are no numbers.
    nothing = normaliser[MAX] == -torch.inf
    normaliser[SUM:].masked_fill_(nothing, 0.0)
    normaliser[MAX] = most


def entropy(normaliser: Tensor) -> Tensor:
    """[3, n] -> nats [n]."""
    return normaliser[SUM].log() + normaliser[MOMENT] / normaliser[SUM]
