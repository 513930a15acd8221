"""Reads a context that several sequences of a batch have once for all of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from opsd.rollout.base import Contexts

SHARED = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers of a cache whose rows can be copied. Others hold recurrent states, or are a model's."""


@contextmanager
def equal_contexts_once(model: PreTrainedModel, contexts: Contexts) -> Iterator[None]:
    """In the first forward while it lasts, each of the equal `contexts`, which are its rows, runs
    once; their keys, values and logits are copied. Not in models that read more than text: they
    keep positions of their own for each row."""
    places: dict[tuple[int, ...], int] = {}
    for row, context in enumerate(contexts):
        places.setdefault(tuple(context), row)
    numbers = {context: number for number, context in enumerate(places)}
    first = torch.tensor(list(places.values()), device=model.device)
    whole = torch.tensor([numbers[tuple(context)] for context in contexts], device=model.device)
    if len(first) == len(whole) or model.config.get_text_config() is not model.config:
        yield
        return

    def reduce(module: nn.Module, inputs: tuple[()], named: dict[str, Any]):
        before.remove()
        cache = named.get("cache", named.get("past_key_values"))
        layers = getattr(cache, "layers", None)
        tensors = {name: x for name, x in named.items() if isinstance(x, Tensor) and x.dim() > 1}
        rows = all(x.dim() == 2 and len(x) == len(whole) for x in tensors.values())
        if inputs or not (rows and layers and all(type(layer) in SHARED for layer in layers)):
            after.remove()
            return inputs, named
        return inputs, named | {name: x[first] for name, x in tensors.items()}

    def expand(module: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
        after.remove()
        named.get("cache", named.get("past_key_values")).batch_select_indices(whole)
        output.logits = output.logits[whole]

    before = model.register_forward_pre_hook(reduce, with_kwargs=True)
    after = model.register_forward_hook(expand, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()
