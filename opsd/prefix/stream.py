"""A model's forward over a packed stream, with our attention in place of its own for that time."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from opsd.prefix import kernels
from opsd.prefix.attention import packed_attention
from opsd.prefix.layout import Group, Layout, checked_groups
from opsd.prefix.support import unpackable

IMPLEMENTATION = "opsd_shared_prefix"

Kept = dict[nn.Module, tuple[Tensor, Tensor]]
"""Attention module → keys [N, K, d] and values [N, K, d_v] of some rows, without gradient."""

Keep = tuple[Tensor, Kept]


@dataclass(frozen=True)
class Segments:
    """What the attention of a stream is told, through the model's forward."""

    layout: Layout
    keep: Keep | None
    past: Kept | None


def shared_prefix_hidden_states(model: PreTrainedModel, groups: Sequence[Group]) -> Tensor:
    """The hidden states that predict the rollouts' tokens, each prefix run once.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        groups: (prefix ids [P], [rollout ids [R_1], …]) each, integer tensors or lists.

    Returns [Σ R, D]: row k is the last hidden state, after the final norm, that predicts the k-th
    rollout token (order: group, rollout, position); differentiable in the parameters. The state at
    a prefix's last position predicts the first token of all its rollouts, and the last token of a
    rollout is only a target and is not run.

    A model with layers that cannot be packed (recurrent, linear attention) runs each rollout by
    itself, with one warning that names the layer. Raises ValueError for empty prefixes or rollouts.
    """
    reason = unpackable(model)
    if reason is not None:
        _warn_once(reason)
        return separate_hidden_states(model, groups)
    return run(model, Layout(groups, model.device))


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

    `keep`: the rows whose keys and values are to be kept, and where; `past`: what was kept.
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


def separate_hidden_states(model: PreTrainedModel, groups: Sequence[Group]) -> Tensor:
    """`shared_prefix_hidden_states`, each rollout in a padded row of its own with its prefix."""
    checked = checked_groups(groups)
    rows = [(prefix, ids) for prefix, rollouts in checked for ids in rollouts]
    tokens = [torch.cat([prefix, ids[:-1]]) for prefix, ids in rows]
    # Padding stands at the right end, where a causal model cannot see it: no mask, and the fast
    # causal attention.
    ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(model.device)
    output = model.get_decoder()(input_ids=ids, use_cache=False)
    places = [
        row * ids.shape[1] + torch.arange(len(prefix) - 1, len(tokens[row]))
        for row, (prefix, _) in enumerate(rows)
    ]
    rows = torch.cat(places).to(model.device)
    return output.last_hidden_state.flatten(0, 1).index_select(0, rows)


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"{reason}: prefixes are not shared, each rollout runs with its own", stacklevel=3
    )


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
    if segments.keep is not None:
        rows, kept = segments.keep
        kept.setdefault(module, (key.detach()[rows], value.detach()[rows]))
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
