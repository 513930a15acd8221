"""Which models can run packed streams, and which of their layers cannot."""

from collections.abc import Iterator
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
"""Of transformers' names for layer types: those whose tokens meet in ordinary attention alone."""

RECURRENT = ("mamba", "ssm", "rwkv", "recurrent", "deltanet", "linearattention", "lightning")
"""Parts of the names of classes that carry a state from token to token."""

UNKNOWN_TO_US = ("sinks", "indexer", "relative_attention_bias")
"""Attributes of attention modules that change its scores in ways that ours does not know."""


def unpackable(model: PreTrainedModel) -> str | None:
    """Why the model cannot run packed streams, naming the layer; None where it can."""
    decoder = model.get_decoder()
    if decoder not in _known:
        _known[decoder] = _reason(decoder)
    return _known[decoder]


_known: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def _reason(decoder: PreTrainedModel) -> str | None:
    config = decoder.config
    if not decoder._can_set_attn_implementation():
        return f"{type(decoder).__name__} does not let its attention be replaced"
    if getattr(config, "is_encoder_decoder", False):
        return f"{type(decoder).__name__} attends to an encoder"
    for index, kind in enumerate(getattr(config, "layer_types", None) or []):
        if kind not in PACKABLE_LAYERS:
            return f"layer {index} of {type(decoder).__name__} is of type {kind}"
    for name, module in _parts(decoder):
        kind = type(module).__name__
        if isinstance(module, nn.Conv1d) or any(word in kind.lower() for word in RECURRENT):
            return f"{name} of {type(decoder).__name__} is a {kind}"
        strange = next((a for a in UNKNOWN_TO_US if getattr(module, a, None) is not None), None)
        if strange:
            return f"{name} of {type(decoder).__name__}, a {kind}, has {strange}"
        if getattr(module, "attention_dropout", 0) and "attention" in kind.lower():
            return f"{name} of {type(decoder).__name__} drops attention at random"
    return None


def _parts(decoder: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """The decoder's modules inside its layers, with their names."""
    return ((name, module) for name, module in decoder.named_modules() if "." in name)
