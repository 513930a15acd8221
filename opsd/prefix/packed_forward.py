"""A model's forward over a packed stream: for its duration our attention replaces the model's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from opsd.prefix.attention import Inputs, kernel_names, packed_attention, probing
from opsd.prefix.layout import Layout

IMPLEMENTATION = "opsd_shared_prefix"

KeysAndValues = dict[nn.Module, tuple[Tensor, Tensor]]
"""Attention module → keys [N, K, d] and values [N, K, d_v] of some rows."""


@dataclass(frozen=True)
class Capture:
    """Where a forward puts its keys and values.

    rows: of the stream; None: all. graph: whether they stay in autograd's graph.
    """

    into: KeysAndValues
    rows: Tensor | None = None
    graph: bool = False


@dataclass(frozen=True)
class Stream:
    """What the attention layers are told of a stream."""

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
    with torch.no_grad(), probing() as inputs:
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
    decoder = model.get_decoder()
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
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None:
            plain[module] = function
            module._gradient_checkpointing_func = _recomputing(function, decoder, stream)
    try:
        with _attending(decoder, stream):
            yield
    finally:
        for module, function in plain.items():
            module._gradient_checkpointing_func = function


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
    **more,
) -> tuple[Tensor, None]:
    """For transformers' AttentionInterface: [1, heads, T, d] each → [1, T, heads, d]."""
    tensors = {"attention_mask": attention_mask, **more}
    strange = [n for n, x in tensors.items() if isinstance(x, Tensor) and n not in KNOWN_TENSORS]
    if strange or dropout:
        what = f"hands {strange[0]} to its attention" if strange else "drops attention at random"
        raise UnpackableError(f"{type(module).__name__} {what}")
    stream = _stream
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    capture = stream.capture
    if capture is not None and module not in capture.into:  # not again in a checkpoint's recompute
        pair = (key, value) if capture.graph else (key.detach(), value.detach())
        if capture.rows is not None:
            pair = tuple(x[capture.rows] for x in pair)
        capture.into[module] = pair
    if stream.past is not None:
        key, value = map(torch.cat, zip(stream.past[module], (key, value), strict=True))
    out = packed_attention(
        query,
        key,
        value,
        stream.layout,
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return out[None], None


AttentionInterface.register(IMPLEMENTATION, _attention)
