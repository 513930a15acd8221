"""A model's forward over a packed stream, and which models cannot run one.

For the forward's duration our attention replaces the model's.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from opsd.common.errors import UserError, in_short
from opsd.models.head import decoder_of
from opsd.prefix.attention import Inputs, by_tiles, kernel_names, packed_attention
from opsd.prefix.layout import Layout, Scores

IMPLEMENTATION = "opsd_shared_prefix"

CHECKPOINT = "_gradient_checkpointing_func"
"""The attribute through which transformers calls a layer that is checkpointed."""

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

RECURRENT = ("Mamba", "SSM", "Rwkv", "Recurrent", "Delta", "LinearAttention", "Lightning")
"""Parts of names of classes that carry a state from token to token (not of SeedOssMLP)."""

UNKNOWN_TO_US = ("indexer", "relative_attention_bias")
"""Attributes of attention modules that change the scores in ways that ours does not know."""

KeysAndValues = dict[nn.Module, tuple[Tensor, Tensor]]
"""Attention module → keys [N, K, d] and values [N, K, d_v] of some rows."""


@dataclass(frozen=True)
class Capture:
    """Where a forward puts its keys and values.

    rows: the stream's rows to capture; None: all. graph: whether they stay in autograd's graph.
    """

    into: KeysAndValues
    rows: Tensor | None = None
    graph: bool = False


@dataclass(frozen=True)
class Stream:
    """What the attention layers need to know of a stream."""

    layout: Layout
    capture: Capture | None
    past: KeysAndValues | None


def try_kernel(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> str:
    """The name of the kernel (or kernels) that this model's streams use in `dtype` on `device`.

    The model may still be elsewhere. Raises UserError where the kernel that was asked for cannot
    serve this model.
    """
    kind = model.device.type
    with torch.no_grad(), torch.autocast(kind, dtype, enabled=dtype != torch.float32):
        return " and ".join(kernel_names(probe(model), device))


def probe(model: PreTrainedModel) -> list[Inputs]:
    """What the model hands to its attention in a stream of two tokens, without gradient.

    Raises UnpackableError where that is more than our attention knows.
    """
    with torch.no_grad(), by_tiles() as inputs:
        try:
            packed_forward(model, Layout([([0], [[0, 0]])], model.device))
        finally:
            # Otherwise a caller's autocast (torch 2.10) would reuse the weights cast here, without
            # a graph.
            torch.clear_autocast_cache()
    return inputs


def packed_forward(
    model: PreTrainedModel,
    layout: Layout,
    *,
    capture: Capture | None = None,
    past: KeysAndValues | None = None,
) -> Tensor:
    """The decoder over a stream: the states that predict the rollouts' tokens, [Σ R, D].

    `past`: keys and values of the layout's past, which ran in another stream.
    """
    decoder = decoder_of(model)
    with packed(decoder, Stream(layout, capture, past)):
        output = decoder(
            input_ids=layout.ids[None], position_ids=layout.positions[None], use_cache=False
        )
    return output.last_hidden_state[0].index_select(0, layout.predictors)


@contextmanager
def packed(decoder: PreTrainedModel, stream: Stream) -> Iterator[None]:
    """Our attention inside, and when backward recomputes a layer that ran inside."""
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
    """`_attention` in the decoder's layers, over this stream.

    The stream is not an argument of the model's forward, since not all models pass on arguments
    that they do not know.
    """
    global _stream
    # set_attn_implementation walks all modules each time; the layers read this one attribute.
    config = decoder.config
    before = config._attn_implementation, _stream
    config._attn_implementation_internal, _stream = IMPLEMENTATION, stream
    try:
        yield
    finally:
        config._attn_implementation_internal, _stream = before


def _recomputing(checkpoint: Callable, decoder: PreTrainedModel, stream: Stream) -> Callable:
    """`checkpoint`, whose recomputation in backward finds our attention in place again."""

    def run(layer: Callable, *inputs):
        def again(*inputs):
            with _attending(decoder, stream):
                return layer(*inputs)

        return checkpoint(again, *inputs)

    return run


def adapter_state(model: nn.Module) -> tuple[bool, ...]:
    """For each adapted layer of the model, whether it applies its adapters now."""
    return tuple(
        bool(m.active_adapters) and not m.disable_adapters
        for m in model.modules()
        if hasattr(m, "lora_A")
    )


class UnpackableError(Exception):
    """This model's attention is more than queries, keys and values; the message says what."""


KNOWN_TENSORS = {"position_ids", "cache_position"}
"""Tensors that models hand to their attention and that do not change it."""


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
    if capture is not None and module not in capture.into:  # not again in a checkpoint's recompute
        pair = (key, value) if capture.graph else (key.detach(), value.detach())
        if capture.rows is not None:
            pair = pair[0][capture.rows], pair[1][capture.rows]
        capture.into[module] = pair
    if stream.past is not None:
        key, value = map(torch.cat, zip(stream.past[module], (key, value), strict=True))
    scores = Scores(scaling, sliding_window, softcap, s_aux)
    return packed_attention(query, key, value, stream.layout, scores)[None], None


AttentionInterface.register(IMPLEMENTATION, _attention)


def unpackable(model: PreTrainedModel) -> str | None:
    """Why the model cannot run packed streams, with the layer's name; None where it can."""
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
    """Ask no more whether this model runs packed streams: another of its architecture does."""
    _known[decoder_of(model)] = None


def _refusal(model: PreTrainedModel) -> str | None:
    """What our attention refuses in a stream of two tokens; None where it refuses nothing."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()  # attention dropout, if any, is on then
    try:
        if not probe(model):
            return f"{type(model).__name__} does not call the attention that replaces its own"
    except UnpackableError as error:
        return str(error)
    except UserError:
        raise
    except Exception as error:  # a model may take something for granted that no stream has
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
    scaled = _scaled_by_length(config)
    if scaled:
        return f"{type(decoder).__name__} scales its positions ({scaled}) by a batch's longest"
    window = getattr(config, "sliding_window", None)
    inside = window and window < (getattr(config, "max_position_embeddings", None) or window + 1)
    told = getattr(config, "layer_types", None)  # then each layer knows whether it has the window
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
