"""A model's language-model head: its weight, bias, scale and soft cap."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def head_arguments(model: PreTrainedModel) -> dict[str, Any]:
    """How this model makes logits of hidden states, as opsd_kernels' arguments."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return {"logit_scale": scale, "logit_softcap": getattr(config, "final_logit_softcapping", None)}


def head(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """The output head: weight [V, D] and bias [V] or None."""
    layer = model.get_output_embeddings()
    return layer.weight, getattr(layer, "bias", None)


def as_operands(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors of a head's product in one dtype: autocast's where it is on, as in any other
    linear layer (the kernel keeps the logits in fp32 all the same), otherwise the first one's.
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
    """The logits [N, V] of some states, in fp32: for a few rows at a time."""
    logits = hidden.float() @ weight.float().T
    if bias is not None:
        logits = logits + bias.float()
    logits = logits * logit_scale
    return logit_softcap * torch.tanh(logits / logit_softcap) if logit_softcap else logits
