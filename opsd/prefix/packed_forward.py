"""Runs a model's forward over a packed stream, and finds out which models cannot do that.

During the forward our attention replaces the model's.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from opsd.common.errors import UserError, in_short
from opsd.models.head import decoder_of, run_decoder
from opsd.prefix.attention import Inputs, by_tiles, kernel_names, packed_attention
from opsd.prefix.images import decoder_inputs
from opsd.prefix.layout import Layout, Scores

IMPLEMENTATION = "opsd_shared_prefix"

CHECKPOINT = "_gradient_checkpointing_func"
"""The attribute with the function by which transformers calls a checkpointed layer."""

PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
"""transformers' layer types in which tokens interact only through ordinary attention."""

SCALED_BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings that depend on the longest sequence of the batch."""

_FLASH = tuple(f"flash_attention_{version}" for version in (2, 3, 4))
SAME_ATTENTION = ("sdpa", "eager", *_FLASH, "flex_attention")
"""transformers' names of plain attention, which ours may replace."""

RECURRENT = ("Mamba", "SSM", "Rwkv", "Recurrent", "Delta", "LinearAttention", "Lightning")
"""Parts of names of classes that carry a state from token to token (not in SeedOssMLP)."""

UNKNOWN_TO_US = ("indexer", "relative_attention_bias")
"""Attributes of attention modules that change scores in ways that our attention does not know."""

KeysAndValues = dict[nn.Module, tuple[Tensor, Tensor]]
"""Attention module → keys [N, K, d] and values [N, K, d_v] of some rows."""


@dataclass(frozen=True)
class Capture:
    """Where a forward stores its keys and values.

    rows: the rows of the stream to store; None: all. graph: keep them in autograd's graph.
    """

    into: KeysAndValues
    rows: Tensor | None = None
    graph: bool = False


@dataclass(frozen=True)
class Stream:
    """What the attention layers need to know about a stream."""

    layout: Layout
    capture: Capture | None
    past: Sequence[KeysAndValues]


def try_kernel(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> str:
    """The name of the kernel (or kernels) that this model's streams use in `dtype` on `device`.

    The model may still be on another device. Raises UserError if the kernel that was asked for
    cannot run this model.
    """
    kind = model.device.type
    with torch.no_grad(), torch.autocast(kind, dtype, enabled=dtype != torch.float32):
        return " and ".join(kernel_names(probe(model), device))


def probe(model: PreTrainedModel) -> list[Inputs]:
    """The inputs of the model's attention, found with a stream of two tokens, without gradient.

    Raises UnpackableError if they are more than our attention knows.
    """
    with torch.no_grad(), by_tiles() as inputs:
        try:
            packed_forward(model, Layout([([0], [[0, 0]])], model.device))
        finally:
            # Otherwise a caller's autocast (torch 2.10) would reuse weights cast without a graph.
            torch.clear_autocast_cache()
    return inputs


def packed_forward(
    model: PreTrainedModel,
    layout: Layout,
    *,
    capture: Capture | None = None,
    past: Sequence[KeysAndValues] = (),
) -> Tensor:
    """Run the decoder over a stream. Returns the states [Σ R, D] that predict the rollouts' tokens.

    `past`: keys and values of the layout's past, in its order, which ran in other streams.
    """
    decoder = decoder_of(model)
    inputs: dict[str, Any] = {"input_ids": layout.ids[None], "position_ids": layout.positions[None]}
    if any(layout.images):
        inputs = decoder_inputs(model, layout)
    with packed(decoder, Stream(layout, capture, past)):
        states = run_decoder(decoder, **inputs)
    return states[0].index_select(0, layout.predictors)


@contextmanager
def packed(decoder: PreTrainedModel, stream: Stream) -> Iterator[None]:
    """A context with our attention, also when backward recomputes a layer that ran inside it."""
    checkpointed = [m for m in decoder.modules() if getattr(m, "gradient_checkpointing", False)]
    plain = {}
    for module in checkpointed:
        function = getattr(module, CHECKPOINT, None)
        if function is not None:
            plain[module] = function
            setattr(module, CHECKPOINT, _recomputing(function, decoder, stream))
    try:
        with _attending(decoder, stream):
            yield
    finally:
        for module, function in plain.items():
            setattr(module, CHECKPOINT, function)


_stream: Stream | None = None


@contextmanager
def _attending(decoder: PreTrainedModel, stream: Stream) -> Iterator[None]:
    """A context in which the decoder's layers call `_attention` with this stream.

    It is not an argument of forward, since not all models pass on arguments that they do not know.
    """
    global _stream
    # Set the attribute that layers read: set_attn_implementation would visit all modules.
    config = decoder.config
    before = config._attn_implementation, _stream
    config._attn_implementation_internal, _stream = IMPLEMENTATION, stream
    try:
        yield
    finally:
        config._attn_implementation_internal, _stream = before


def _recomputing(checkpoint: Callable, decoder: PreTrainedModel, stream: Stream) -> Callable:
    """Wrap `checkpoint` so that its recomputation in backward uses our attention again."""

    def run(layer: Callable, *inputs):
        def again(*inputs):
            with _attending(decoder, stream):
                return layer(*inputs)

        return checkpoint(again, *inputs)

    return run


def adapter_state(model: nn.Module) -> tuple[bool, ...]:
    """For each adapted layer, whether its adapters are switched on."""
    return tuple(
        bool(m.active_adapters) and not m.disable_adapters
        for m in model.modules()
        if hasattr(m, "lora_A")
    )


class UnpackableError(Exception):
    """This model's attention needs more than queries, keys and values; the message says what."""


KNOWN_TENSORS = {"position_ids", "cache_position"}
"""Tensors that models pass to their attention and that do not change it."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **more,
) -> tuple[Tensor, None]:
    """For transformers' AttentionInterface: [1, heads, T, d] each → [1, T, heads, d]."""
    tensors = {"attention_mask": attention_mask, **more}
    strange = [n for n, x in tensors.items() if isinstance(x, Tensor) and n not in KNOWN_TENSORS]
    if strange or dropout:
        what = f"hands {strange[0]} to its attention" if strange else "drops attention at random"
        raise UnpackableError(f"{type(module).__name__} {what}")
    if s_aux is None and getattr(module, "sinks", None) is not None:
        raise UnpackableError(f"{type(module).__name__} has sinks and does not hand them on")
    stream = _stream
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    capture = stream.capture
    if capture is not None and module not in capture.into:  # only once, not when recomputed
        pair = (key, value) if capture.graph else (key.detach(), value.detach())
        if capture.rows is not None:
            pair = pair[0][capture.rows], pair[1][capture.rows]
        capture.into[module] = pair
    if stream.past:  # joined for this layer only: of all layers it would be the whole cache again
        before = [each[module] for each in stream.past]
        key, value = map(torch.cat, zip(*before, (key, value), strict=True))
    scores = Scores(scaling, sliding_window, softcap, s_aux)
    return packed_attention(query, key, value, stream.layout, scores)[None], None


AttentionInterface.register(IMPLEMENTATION, _attention)


def unpackable(model: PreTrainedModel) -> str | None:
    """Why the model cannot run packed streams, with the layer's name; None if it can."""
    decoder = decoder_of(model)
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


def take_as_packable(model: PreTrainedModel) -> None:
    """Record that this model runs packed streams, because another of its architecture does."""
    _known[decoder_of(model)] = None


def _refusal(model: PreTrainedModel) -> str | None:
    """Run a stream of two tokens. Returns why our attention refuses it, or None."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()  # attention dropout, if any, is on then
    try:
        if not probe(model):
            return f"{type(model).__name__} does not call the attention that replaces its own"
    except UnpackableError as error:
        return str(error)
    except UserError:
        raise
    except Exception as error:  # the model may need what a stream lacks
        return f"{type(model).__name__} fails in a packed stream ({in_short(error)})"
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
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        return f"{type(decoder).__name__} takes no positions, which begin again in a stream"
    scaled = scaled_by_length(config)
    if scaled:
        return f"{type(decoder).__name__} scales its positions ({scaled}) by a batch's longest"
    window = getattr(config, "sliding_window", None)
    inside = window and window < (getattr(config, "max_position_embeddings", None) or window + 1)
    told = getattr(config, "layer_types", None)  # if set, layers know their window
    inner = ((name, module) for name, module in decoder.named_modules() if "." in name)
    for name, module in inner:
        kind = type(module).__name__
        if isinstance(module, nn.Conv1d) or any(word in kind for word in RECURRENT):
            return f"{name} of {type(decoder).__name__} is a {kind}"
        strange = next((a for a in UNKNOWN_TO_US if getattr(module, a, None) is not None), None)
        if strange:
            return f"{name} of {type(decoder).__name__}, a {kind}, has {strange}"
        if inside and not told and kind.endswith("Attention") and not _knows_window(module):
            return f"{name} of {type(decoder).__name__} leaves its sliding window to a mask"
        if getattr(module, "attention_dropout", 0) and "attention" in kind.lower():
            return f"{name} of {type(decoder).__name__} drops attention at random"
    return None


def scaled_by_length(config) -> str | None:
    """The type of the rotary embedding if it is in SCALED_BY_LENGTH, else None."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    kinds = [each.get("rope_type") for each in nested or [parameters]]
    return next((kind for kind in kinds if kind in SCALED_BY_LENGTH), None)


def _knows_window(attention: nn.Module) -> bool:
    """Whether the module's code names the window: otherwise it cannot pass it to our attention."""
    code = inspect.unwrap(type(attention).forward).__code__
    return "sliding_window" in (*code.co_names, *code.co_consts)
