"""The contents of a tile for one role."""

from typing import NamedTuple

from torch import Tensor


class Logits(NamedTuple):
    """A role's products in a tile of n tokens and v vocabulary entries, before the transform to
    logits: product [n, v] (h W^T) + bias [v].
    """

    product: Tensor
    bias: Tensor | None = None
