"""Which models can run packed streams, and which of their layers cannot."""

import inspect
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from opsd.prefix.layout import Group, checked_groups
from opsd.prefix.packed_forward import UnpackableError, probe

PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
"""Of transformers' names for layer types: those whose tokens meet in ordinary attention alone."""

SCALED_BY_LENGTH = ("dynamic", "longrope")
"""Kinds of rotary positions that a longer sequence beside it changes."""

SAME_ATTENTION = (
    "sdpa",
    "eager",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
)
"""transformers' names of plain attention, in whose place ours may stand."""

RECURRENT = ("mamba", "ssm", "rwkv", "recurrent", "deltanet", "linearattention", "lightning")
"""StepTimer of the names of classes that carry a state from token to token."""

UNKNOWN_TO_US = ("sinks", "indexer", "relative_attention_bias")
"""Attributes of attention modules that change its scores in ways that ours does not know."""


def unpackable(model: PreTrainedModel) -> str | None:
    """Why the model cannot run packed streams, naming the layer; None where it can."""
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


def groups_of(model: PreTrainedModel, groups: Sequence[Group]) -> list[tuple[Tensor, list[Tensor]]]:
    """`checked_groups`, which this model can run.

    Raises ValueError for ids that it has no embedding of, and more tokens than it has positions.
    """
    checked = checked_groups(groups)
    decoder = model.get_decoder()
    positions = getattr(decoder.config, "max_position_embeddings", None)
    rows = len(decoder.get_input_embeddings().weight)
    for number, (prefix, rollouts) in enumerate(checked):
        longest = len(prefix) + max(map(len, rollouts)) - 1
        if positions is not None and longest > positions:
            raise ValueError(
                f"groups[{number}] has a prefix of {len(prefix)} tokens and a rollout of "
                f"{longest + 1 - len(prefix)}: {type(decoder).__name__} has {positions} positions "
                "(max_position_embeddings), and a rollout's last token needs none"
            )
        for ids in (prefix, *rollouts):
            if isinstance(ids, FakeTensor):
                continue  # a plan's, which has no values
            if int(ids.min()) < 0 or int(ids.max()) >= rows:
                raise ValueError(
                    f"groups[{number}] holds ids from {int(ids.min())} to {int(ids.max())}: "
                    f"{type(decoder).__name__} has embeddings of 0 to {rows - 1}"
                )
    return checked


def _refusal(model: PreTrainedModel) -> str | None:
    """What our attention says when it is given what it does not know, in a stream of two tokens."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()  # what drops attention at random does so then
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
    told = getattr(config, "layer_types", None)  # then each layer has the window or has none
    for name, module in _parts(decoder):
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


def _parts(decoder: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """The decoder's modules inside its layers, with their names."""
    return ((name, module) for name, module in decoder.named_modules() if "." in name)


def _scaled_by_length(config) -> str | None:
    """The kind of positions whose scale depends on the longest sequence of a batch."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    kinds = [each.get("rope_type") for each in nested or [parameters]]
    return next((kind for kind in kinds if kind in SCALED_BY_LENGTH), None)


def _knows_window(attention: nn.Module) -> bool:
    """Whether its code names the window, which it must to hand it to our attention."""
    code = inspect.unwrap(type(attention).forward).__code__
    return "sliding_window" in (*code.co_names, *code.co_consts)
