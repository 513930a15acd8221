"""Which models can run packed streams, and which of their layers cannot."""

import inspect
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from opsd.prefix.packed_forward import UnpackableError, probe

PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
"""transformers' names of layer types whose tokens meet in ordinary attention only."""

SCALED_BY_LENGTH = ("dynamic", "longrope")
"""Kinds of rotary positions that depend on the longest sequence of the batch."""

SAME_ATTENTION = (
    "sdpa",
    "eager",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
)
"""transformers' names of plain attention, which ours may replace."""

RECURRENT = ("mamba", "ssm", "rwkv", "recurrent", "deltanet", "linearattention", "lightning")
"""Parts of names of classes that carry a state from token to token."""

UNKNOWN_TO_US = ("sinks", "indexer", "relative_attention_bias")
"""Attributes of attention modules that change the scores in ways that ours does not know."""


def unpackable(model: PreTrainedModel) -> str | None:
    """Why the model cannot run packed streams, with the layer's name; None where it can."""
    decoder = model.get_decoder()
    attention = decoder.config._attn_implementation
    if attention not in SAME_ATTENTION:
        return (
            f"{type(decoder).__name__} attends by {attention!r}, which is not replaced by another "
            f"(these compute the same: {', '.join(SAME_ATTENTION)})"
        )
    if decoder not in _known:
        _known[decoder] = _reason(decoder) or _refusal(model)
    return _known[decoder]


_known: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def _refusal(model: PreTrainedModel) -> str | None:
    """What our attention refuses in a stream of two tokens; None where it refuses nothing."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()  # attention dropout, if any, is on then
    try:
        probe(model)
    except UnpackableError as error:
        return str(error)
    finally:
        for module, training in modes:
            module.training = training
    return None


def _reason(decoder: PreTrainedModel) -> str | None:
    config = decoder.config
    if not decoder._can_set_attn_implementation():
        return f"{type(decoder).__name__} does not let its attention be replaced"
    if getattr(config, "is_encoder_decoder", False):
        return f"{type(decoder).__name__} attends to an encoder"
    for index, kind in enumerate(getattr(config, "layer_types", None) or []):
        if kind not in PACKABLE_LAYERS:
            return f"layer {index} of {type(decoder).__name__} is of type {kind}"
    scaled = _scaled_by_length(config)
    if scaled:
        return f"{type(decoder).__name__} scales its positions ({scaled}) by a batch's longest"
    window = getattr(config, "sliding_window", None)
    inside = window and window < (getattr(config, "max_position_embeddings", None) or window + 1)
    told = getattr(config, "layer_types", None)  # then each layer knows whether it has the window
    inner = ((name, module) for name, module in decoder.named_modules() if "." in name)
    for name, module in inner:
        kind = type(module).__name__
        if isinstance(module, nn.Conv1d) or any(word in kind.lower() for word in RECURRENT):
            return f"{name} of {type(decoder).__name__} is a {kind}"
        strange = next((a for a in UNKNOWN_TO_US if getattr(module, a, None) is not None), None)
        if strange:
            return f"{name} of {type(decoder).__name__}, a {kind}, has {strange}"
        if inside and not told and kind.endswith("Attention") and not _knows_window(module):
            return f"{name} of {type(decoder).__name__} leaves its sliding window to a mask"
        if getattr(module, "attention_dropout", 0) and "attention" in kind.lower():
            return f"{name} of {type(decoder).__name__} drops attention at random"
    return None


def _scaled_by_length(config) -> str | None:
    """The kind of rotary positions, where it is one of SCALED_BY_LENGTH."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    kinds = [each.get("rope_type") for each in nested or [parameters]]
    return next((kind for kind in kinds if kind in SCALED_BY_LENGTH), None)


def _knows_window(attention: nn.Module) -> bool:
    """Whether its code names the window: if not, it cannot hand it to our attention."""
    code = inspect.unwrap(type(attention).forward).__code__
    return "sliding_window" in (*code.co_names, *code.co_consts)
