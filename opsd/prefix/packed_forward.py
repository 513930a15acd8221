"""A model's forward over a packed stream, with our attention in place of its own for that time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from opsd.prefix import choose_kernel as kernels
from opsd.prefix.attention import packed_attention
from opsd.prefix.layout import Layout

IMPLEMENTATION = "opsd_shared_prefix"

Kept = dict[nn.Module, tuple[Tensor, Tensor]]
"""Attention module → keys [N, K, d] and values [N, K, d_v] of some rows."""


@dataclass(frozen=True)
class Keep:
    """Keys and values that a run is to keep.

    rows: of the stream; None: all. graph: whether they stay in autograd's graph.
    """

    into: Kept
    rows: Tensor | None = None
    graph: bool = False


@dataclass(frozen=True)
class Segments:
    """What the attention of a stream is told."""

    layout: Layout
    keep: Keep | None
    past: Kept | None


def try_kernel(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> str:
    """The name of the kernel (or kernels) that attends when this model's streams run in `dtype`.

    `device`: where they will; the model may still be elsewhere. Raises UserError where the kernel
    that was asked for cannot serve this model.
    """
    kind = model.device.type
    with torch.no_grad(), torch.autocast(kind, dtype, enabled=dtype != torch.float32):
        return " and ".join(kernels.kernel_names(probe(model), device))


def probe(model: PreTrainedModel) -> list[kernels.Inputs]:
    """What attention is given in a stream of two tokens, without gradient.

    Raises UnpackableError where that is more than ours knows.
    """
    with torch.no_grad(), kernels.probing() as inputs:
        try:
            run(model, Layout([([0], [[0, 0]])], model.device))
        finally:
            # A caller's autocast (torch 2.10) would take what was cast here, without a graph.
            torch.clear_autocast_cache()
    return inputs


def run(
    model: PreTrainedModel, layout: Layout, *, keep: Keep | None = None, past: Kept | None = None
) -> Tensor:
    """The decoder over a stream: the states that predict the rollouts' tokens, [Σ R, D].

    `past`: what was kept, of the layout's past.
    """
    decoder = model.get_decoder()
    with packed(decoder, Segments(layout, keep, past)):
        output = decoder(
            input_ids=layout.ids[None], position_ids=layout.positions[None], use_cache=False
        )
    return output.last_hidden_state[0].index_select(0, layout.predictors)


@contextmanager
def packed(decoder: PreTrainedModel, segments: Segments) -> Iterator[None]:
    """Our attention inside, and again whenever backward recomputes a layer that ran inside."""
    checkpointed = [m for m in decoder.modules() if getattr(m, "gradient_checkpointing", False)]
    plain = {}
    for module in checkpointed:
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None:
            plain[module] = function
            module._gradient_checkpointing_func = _recomputing(function, decoder, segments)
    try:
        with _attending(decoder, segments):
            yield
    finally:
        for module, function in plain.items():
            module._gradient_checkpointing_func = function


_segments: Segments | None = None


@contextmanager
def _attending(decoder: PreTrainedModel, segments: Segments) -> Iterator[None]:
    """`_attention` in the decoder's layers, over these segments.

    They are not an argument of the model's forward: not all models hand on what they do not know.
    """
    global _segments
    # set_attn_implementation walks all modules each time; the layers read this one attribute.
    config = decoder.config
    before = config._attn_implementation, _segments
    config._attn_implementation_internal, _segments = IMPLEMENTATION, segments
    try:
        yield
    finally:
        config._attn_implementation_internal, _segments = before


def _recomputing(checkpoint: Callable, decoder: PreTrainedModel, segments: Segments) -> Callable:
    """`checkpoint`, whose recomputation in backward finds our attention in place again."""

    def run(layer: Callable, *inputs):
        def again(*inputs):
            with _attending(decoder, segments):
                return layer(*inputs)

        return checkpoint(again, *inputs)

    return run


class UnpackableError(Exception):
    """This model's attention is more than queries, keys and values; the message says what."""


KNOWN_TENSORS = {"position_ids", "cache_position"}
"""Of what models hand to their attention: those that do not change it."""


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
    segments = _segments
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    keep = segments.keep
    if keep is not None and module not in keep.into:  # not when a checkpoint computes it again
        kept = (key, value) if keep.graph else (key.detach(), value.detach())
        keep.into[module] = kept if keep.rows is None else tuple(x[keep.rows] for x in kept)
    if segments.past is not None:
        key, value = map(torch.cat, zip(segments.past[module], (key, value), strict=True))
    out = packed_attention(
        query,
        key,
        value,
        segments.layout,
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return out[None], None


AttentionInterface.register(IMPLEMENTATION, _attention)
