"""A model's decoder and its run, its attention's shapes, and its language-model head: weight, bias,
logit scale and soft cap; and the head of a mixture of models.

A geometric mixture of models (`teacher.mix`) predicts p ∝ Π_i p_i^c_i. Logits are linear in hidden
states, so its logits are Σ c_i (W_i h_i + b_i). If the models share a head, they are the logits of
the one state Σ c_i h_i. If not, they are those of the states c_i h_i side by side under the head
[W_1 | W_2 | …]. Where c_i differs by token, a bias becomes one more column: [W_i | b_i] with the
state [c_i h_i, c_i]. This is exact and makes no logits. A soft cap is not linear:
`opsd.models.teacher` refuses it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Names of the factor of the logits, in the configs of Cohere, Falcon-H1 and Muse."""

ASKS = "output_router_logits"
"""transformers' argument and config field by which a decoder returns its routers' logits."""

DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
"""Names of the divisor of the logits, in the configs of Granite and Inkling."""

CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names of the soft cap of the logits, in the configs of Gemma, RecurrentGemma and xLSTM."""


def is_split(model: nn.Module) -> bool:
    """Whether weights are split over processes, which must then run the model equally often."""
    return any(hasattr(w, "ds_id") or hasattr(w, "full_tensor") for w in model.parameters())


def head_arguments(model: PreTrainedModel) -> dict[str, Any]:
    """The model's logit scale and soft cap, as arguments of opsd_kernels' functions."""
    config = model.config.get_text_config()
    factors = [getattr(config, name, None) or 1.0 for name in SCALES]
    divisor = prod(getattr(config, name, None) or 1.0 for name in DIVISORS)
    if config.model_type.startswith("hyperclovax"):  # it multiplies where others divide
        divisor = 1 / divisor
    caps = [getattr(config, name, None) for name in CAPS]
    cap = next((cap for cap in caps if cap is not None), None)
    return {"logit_scale": prod(factors) / divisor, "logit_softcap": cap}


def head(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """The output head: weight [V, D] and bias [V] or None."""
    layer = model.get_output_embeddings()
    return layer.weight, getattr(layer, "bias", None)


def as_operands(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Cast the tensors of a head's product to one dtype: autocast's where it is on, as in any other
    linear layer, or else the first tensor's. (The kernel keeps the logits in fp32 in both cases.)
    """
    first = tensors[0]
    kind = first.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else first.dtype
    return [None if x is None else x.to(dtype) for x in tensors]


def logits_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """Compute the logits [N, V] of hidden states [N, D] in fp32; for a few rows only."""
    logits = hidden.float() @ weight.float().T
    if bias is not None:
        logits = logits + bias.float()
    logits = logits * logit_scale
    return logit_softcap * torch.tanh(logits / logit_softcap) if logit_softcap else logits


class Scorer(NamedTuple):
    """Hidden states [N, D] and the head to score them with: weight [V, D], bias [V] or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


@torch.no_grad()
def mixed(
    models: Sequence[PreTrainedModel],
    states: Sequence[Tensor],
    coefficients: Sequence[float | Tensor],
    vocabulary: int,
    side_by_side: dict[tuple[int, ...], Tensor] | None = None,
) -> Scorer:
    """The hidden states and the head of the mixture of `models`, which have these `states`. Heads
    may be padded to different sizes: the mixture has the entries that all have, at most
    `vocabulary`. coefficients: numbers, or tensors [N].

    side_by_side: a cache of joined heads (copies of them all), to pass to the next call again.
    """
    heads = [head(model) for model in models]
    size = min(vocabulary, *(len(weight) for weight, _ in heads))
    by_head: dict[int, list[int]] = {}
    for number, (weight, _) in enumerate(heads):
        by_head.setdefault(id(weight), []).append(number)
    parts = [
        _sum([states[n] for n in own], [coefficients[n] for n in own]) for own in by_head.values()
    ]
    weights = [_first(heads[own[0]][0], size) for own in by_head.values()]
    biases = []
    for (_, bias), c in zip(heads, coefficients, strict=True):
        if bias is not None and isinstance(c, Tensor):
            parts.append(c[:, None].to(parts[0].dtype))
            weights.append(_first(bias, size)[:, None])
        elif bias is not None:
            biases.append((_first(bias, size), c))
    joined = {} if side_by_side is None else side_by_side
    key = (size, len(weights), *by_head)
    if key not in joined:
        joined[key] = weights[0] if len(weights) == 1 else torch.cat(weights, -1)
    return Scorer(
        parts[0] if len(parts) == 1 else torch.cat(parts, -1),
        joined[key],
        _sum(*map(list, zip(*biases, strict=True))) if biases else None,
    )


def _first(tensor: Tensor, size: int) -> Tensor:
    """The first `size` rows; the same object if these are all, to be known as the same head."""
    return tensor if len(tensor) == size else tensor[:size]


def _sum(tensors: Sequence[Tensor], coefficients: Sequence[float | Tensor]) -> Tensor:
    """Compute Σ c_i x_i in fp32 or fp64 and round it once."""
    first = coefficients[0]
    if len(tensors) == 1 and not isinstance(first, Tensor) and first == 1:
        return tensors[0]
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    factors = [c[:, None] if isinstance(c, Tensor) else c for c in coefficients]
    total = reduce(torch.add, (c * x.to(wide) for x, c in zip(tensors, factors, strict=True)))
    return total.to(tensors[0].dtype)


def embedding_rows(model: PreTrainedModel) -> int:
    """How many token ids the model has an embedding for."""
    return len(cast(Tensor, model.get_input_embeddings().weight))


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head, but with its adapters.

    transformers' get_decoder (5.24) returns the whole text model for Llama 4, and a layer of the
    head for ModernBERT's decoder.
    """
    whole = getattr(model, "get_base_model", lambda: model)()  # peft's wrapper has one
    found: nn.Module = whole.get_decoder()
    if not isinstance(found, PreTrainedModel) or found is whole:
        return cast(PreTrainedModel, whole.model)
    return found if found.get_output_embeddings() is None else decoder_of(found)


_kept: list[tuple[tuple[Tensor, ...], Tensor | None]] | None = None


@contextmanager
def keeping_router_logits(keep: bool) -> Iterator[list[tuple[tuple[Tensor, ...], Tensor | None]]]:
    """A context in which `run_decoder` adds routers' logits to the list, if `keep` says so."""
    global _kept
    found: list[tuple[tuple[Tensor, ...], Tensor | None]] = []
    before, _kept = _kept, found if keep else None
    try:
        yield found
    finally:
        _kept = before


def counts_router_logits() -> bool:
    """Whether `keeping_router_logits` keeps those of this pass."""
    return _kept is not None and torch.is_grad_enabled()


def is_checkpointed(decoder: nn.Module) -> bool:
    """Whether layers of a decoder that trains compute their activations again in backward."""
    return any(
        getattr(m, "gradient_checkpointing", False) and m.training for m in decoder.modules()
    )


def run_decoder(decoder: PreTrainedModel, counted: Tensor | None = None, **inputs: Any) -> Tensor:
    """The decoder's last hidden states. counted: which tokens [B, T] the routers' loss counts;
    None: all. Passes without gradient, as a teacher's, do not count."""
    keep = counts_router_logits()
    output = decoder(**inputs, use_cache=False, **({ASKS: True} if keep else {}))
    if keep:
        _kept.append((output.router_logits, counted))
    return output.last_hidden_state


def attention_shapes(config: PreTrainedConfig) -> list[tuple[int, int, int]]:
    """(heads, key heads, head width) of each layer, zeros for a model without attention. They
    differ by layer in Gemma 4."""
    text = config.get_text_config()
    layers = [text] * text.num_hidden_layers
    if getattr(text, "is_heterogeneous", False):
        layers = list(text.per_layer_config)
    if not hasattr(layers[0], "num_attention_heads"):  # Mamba, RWKV
        return [(0, 0, 0)] * len(layers)
    return [
        (
            layer.num_attention_heads,
            getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads,
            getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads,
        )
        for layer in layers
    ]
