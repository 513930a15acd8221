"""Makes a model decode faster while a context lasts. Its numbers change by rounding at most."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from opsd_kernels.attention import single_tokens
from opsd_kernels.packed import packable, packed_weights

LEAST_ROOM = 64  # tokens
MOST_PACKED = 2**30  # bytes of weights: their second copy must be small beside a training step
PACKING_PAYS = 16  # decoded tokens; and, for weights in fp32, sequences at once


@contextmanager
def decodes_fast(model: PreTrainedModel, tokens: int, rows: int = 1) -> Iterator[None]:
    """While it lasts, the model's cache has room for more tokens. On a CPU, attention of single
    tokens is ours, and so are products with weights, which are packed if that pays for so many new
    `tokens` of each sequence, with so many `rows` (sequences) at once."""
    layers = [x for x in model.modules() if packable(x)] if tokens >= PACKING_PAYS else []
    if not packs(sum(layer.weight.nbytes for layer in layers), model.dtype, rows):
        layers = []
    with single_tokens(), packed_weights(layers), model.register_forward_hook(_make_room):
        yield


def packs(size: int, dtype: torch.dtype, rows: int) -> bool:
    """Whether weights of `size` bytes are packed to sample `rows` sequences at once."""
    return size <= MOST_PACKED and (dtype == torch.bfloat16 or rows >= PACKING_PAYS)


def _make_room(model: nn.Module, inputs: Any, output: Any) -> None:
    """After a forward, give room to the layers of its cache that `generate` would copy whole for
    each token. Others stay: sliding windows, recurrent states."""
    cache = getattr(output, "cache", None) or getattr(output, "past_key_values", None)
    for i, layer in enumerate(layers := getattr(cache, "layers", [])):
        if type(layer) is DynamicLayer and layer.is_initialized:
            layers[i] = Roomy(layer)


class Roomy(DynamicLayer):
    """A layer's keys and values [batch, heads, tokens, width] at the start of larger tensors, into
    which new ones are written."""

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        vars(self).update(vars(layer))
        self._larger: tuple[Tensor, ...] = (self.keys, self.values)
        self._made = self.keys

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Add the keys and values of new tokens; returns all."""
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        changed = self.keys is not self._made  # by another method than this
        if changed or end > self._larger[0].shape[-2]:
            room = end - start + max(LEAST_ROOM, end // 4)
            self._larger = tuple(
                torch.cat((x, x.new_zeros(*x.shape[:-2], room, x.shape[-1])), dim=-2)
                for x in (self.keys, self.values)
            )
        self._larger[0][..., start:end, :] = key_states
        self._larger[1][..., start:end, :] = value_states
        self.keys, self.values = (larger[..., :end, :] for larger in self._larger)
        self._made = self.keys
        return self.keys, self.values
