"""The teacher's distribution as the kernel takes it: hidden states, and the head to them.

With `teacher.mix` the teacher is a geometric mixture of its members' distributions,

    p_T ∝ Π_i p_i^c_i.

Logits are linear in hidden states, so that its logits are Σ c_i (W_i h_i + b_i): those of one state
Σ c_i h_i under a head that the members share, and of the states c_i h_i side by side under heads
[W_1 | W_2 | …] that differ. The mixture is exact, and no logits are made for it. A soft cap on the
logits breaks the line; `opsd.models.teacher` refuses it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd.models.head import head


class Scorer(NamedTuple):
    """hidden [N, D], and a head: weight [V, D] and bias [V] or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


@torch.no_grad()
def mixed(
    models: Sequence[PreTrainedModel],
    states: Sequence[Tensor],
    coefficients: Sequence[float],
    vocabulary: int,
) -> Scorer:
    """The mixture of `models`, by their `states`, over as many entries as all heads have, and
    `vocabulary` at most: heads may be padded to different sizes."""
    heads = [head(model) for model in models]
    size = min(vocabulary, *(len(weight) for weight, _ in heads))
    by_head: dict[int, list[int]] = {}
    for number, (weight, _) in enumerate(heads):
        by_head.setdefault(id(weight), []).append(number)
    parts = [
        _sum([states[n] for n in own], [coefficients[n] for n in own]) for own in by_head.values()
    ]
    weights = [_first(heads[own[0]][0], size) for own in by_head.values()]
    pairs = zip(heads, coefficients, strict=True)
    biases = [(_first(bias, size), c) for (_, bias), c in pairs if bias is not None]
    return Scorer(
        parts[0] if len(parts) == 1 else torch.cat(parts, -1),
        weights[0] if len(weights) == 1 else torch.cat(weights, -1),
        _sum(*map(list, zip(*biases, strict=True))) if biases else None,
    )


def _first(tensor: Tensor, size: int) -> Tensor:
    """Its first rows; the tensor itself where these are all, so that it is known as one head."""
    return tensor if len(tensor) == size else tensor[:size]


def _sum(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Σ c_i x_i, rounded once."""
    if len(tensors) == 1 and coefficients[0] == 1:
        return tensors[0]
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    total = sum(c * x.to(wide) for x, c in zip(tensors, coefficients, strict=True))
    return total.to(tensors[0].dtype)
