"""What a tile holds of a role."""

from typing import NamedTuple

from torch import Tensor


class Logits(NamedTuple):
    """A role's logits in a tile of n tokens and v vocabulary entries, before their transform:
    product [n, v] (h W^T) + bias [v].
    """

    product: Tensor
    bias: Tensor | None = None
