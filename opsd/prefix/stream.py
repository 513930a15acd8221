"""A model's forward over a packed stream, with our attention in place of its own for that time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from opsd.prefix import kernels
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
    """What the attention of a stream is told, through the model's forward."""

    layout: Layout
    keep: Keep | None
    past: Kept | None


def try_kernel(model: PreTrainedModel, dtype: torch.dtype) -> str:
    """The name of the kernel (or kernels) that attends when this model's streams run in `dtype`.

    Raises UserError where the one that was asked for cannot serve this model.
    """
    kind = model.device.type
    kernels.forget()
    with torch.no_grad(), torch.autocast(kind, dtype, enabled=dtype != torch.float32):
        run(model, Layout([([0], [[0, 0]])], model.device))
    return " and ".join(kernels.given())


def run(
    model: PreTrainedModel, layout: Layout, *, keep: Keep | None = None, past: Kept | None = None
) -> Tensor:
    """The decoder over a stream: the states that predict the rollouts' tokens, [Σ R, D].

    `past`: what was kept, of the layout's past.
    """
    decoder = model.get_decoder()
    with packed(decoder):
        output = decoder(
            input_ids=layout.ids[None],
            position_ids=layout.positions[None],
            use_cache=False,
            segments=Segments(layout, keep, past),
        )
    return output.last_hidden_state[0].index_select(0, layout.predictors)


@contextmanager
def packed(decoder: PreTrainedModel) -> Iterator[None]:
    """Our attention inside, and again whenever backward recomputes a layer that ran inside."""
    checkpointed = [m for m in decoder.modules() if getattr(m, "gradient_checkpointing", False)]
    plain = {}
    for module in checkpointed:
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None:
            plain[module] = function
            module._gradient_checkpointing_func = _recomputing(function, decoder)
    try:
        with _implementation(decoder):
            yield
    finally:
        for module, function in plain.items():
            module._gradient_checkpointing_func = function


@contextmanager
def _implementation(decoder: PreTrainedModel) -> Iterator[None]:
    # set_attn_implementation walks all modules each time; the layers read this one attribute.
    config = decoder.config
    before = config._attn_implementation
    config._attn_implementation_internal = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def _recomputing(checkpoint: Callable, decoder: PreTrainedModel) -> Callable:
    """`checkpoint`, whose recomputation in backward finds our attention in place again."""

    def run(layer: Callable, *inputs):
        def again(*inputs):
            with _implementation(decoder):
                return layer(*inputs)

        return checkpoint(again, *inputs)

    return run


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_,
) -> tuple[Tensor, None]:
    """For transformers' AttentionInterface: [1, heads, T, d] each → [1, T, heads, d]."""
    assert attention_mask is None and query.shape[0] == 1
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
