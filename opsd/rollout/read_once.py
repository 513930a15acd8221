"""Reads once what contexts of a batch have in common: equal contexts, and how all begin."""

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
SAVED = {"cpu": 256, "gpu": 8192}
"""The least number of tokens for which a forward more pays: one of few tokens has its own cost."""


@contextmanager
def reads_once(model: PreTrainedModel, contexts: Contexts) -> Iterator[None]:
    """In the first forward while it lasts, whose rows are `contexts`, padded on the left, equal
    ones run once, and so does how all begin. Keys, values and logits are copied. Not in models that
    read more than text: they keep positions of their own for each row."""
    places = {tuple(context): row for row, context in enumerate(contexts)}
    numbers = {context: number for number, context in enumerate(places)}
    chosen = torch.tensor(list(places.values()), device=model.device)
    whole = torch.tensor([numbers[tuple(context)] for context in contexts], device=model.device)
    width, longest = max((len(context), row) for row, context in enumerate(contexts))
    same = [len(set(tokens)) == 1 for tokens in zip(*(c[:-1] for c in places), strict=False)]
    begin = [*same, False].index(False)
    begin *= begin * (len(chosen) - 1) >= SAVED["cpu" if model.device.type == "cpu" else "gpu"]
    text = model.config.get_text_config() is model.config
    if not text or (len(chosen) == len(whole) and not begin):
        yield
        return

    def reduce(module: nn.Module, inputs: tuple[()], named: dict[str, Any]):
        hooks.pop().remove()
        cache = named.get("cache", named.get("past_key_values"))
        layers = getattr(cache, "layers", None)
        tensors = {name: x for name, x in named.items() if isinstance(x, Tensor) and x.dim() > 1}
        rows = all(x.shape == (len(whole), width) for x in tensors.values())
        if inputs or not (rows and layers and all(type(layer) in SHARED for layer in layers)):
            return inputs, named
        start = min([begin, *(x.sliding_window - 1 for x in layers if x.is_sliding)])
        if start:
            module.forward(
                **named | {name: x[longest, None, :start] for name, x in tensors.items()}
            )
        if start and any(layer.get_seq_length() != start for layer in layers):
            cache.reset()  # CPM-Ant adds tokens of its own
            start = 0
        if start:
            padding = torch.tensor([width - len(context) for context in places])
            columns = (torch.arange(start) - padding[:, None]).clamp(min=0).to(model.device)
            for layer in layers:
                layer.keys = layer.keys[0][:, columns].transpose(0, 1)
                layer.values = layer.values[0][:, columns].transpose(0, 1)
        hooks.append(module.register_forward_hook(expand, with_kwargs=True, prepend=True))
        seen = {"attention_mask": 0}  # all others are of the tokens that it reads
        return inputs, named | {k: x[chosen, seen.get(k, start) :] for k, x in tensors.items()}

    def expand(module: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
        hooks.pop().remove()
        named.get("cache", named.get("past_key_values")).batch_select_indices(whole)
        output.logits = output.logits[whole]

    hooks = [model.register_forward_pre_hook(reduce, with_kwargs=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
