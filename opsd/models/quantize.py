"""Quantises a frozen model's linear layers to 8 bits, to save memory.

This is for teachers, which only run forward. The embedding and the head stay as they are: the loss
reads the head's weight directly, and an embedding is no matrix product.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from opsd.common.errors import UserError
from opsd.models.offload import decoder_layers

LEVELS = 127


class Int8Linear(nn.Module):
    """A linear layer whose weight is w ≈ q · s, with q in int8 and one scale s for each row of w.

    Each forward computes the weight in the input's dtype, for one layer at a time. Rounding changes
    an entry by at most half a step: s / 2 = max |w| / 254 over its row.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight = layer.weight.detach().float()
        least = torch.finfo(torch.float32).tiny
        scale = weight.abs().amax(1, keepdim=True).clamp_min(least) / LEVELS
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.to(layer.weight.dtype))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, states: Tensor) -> Tensor:
        """states [..., in] → [..., out]."""
        weight = self.weight.to(self.scale.dtype) * self.scale
        return linear(states, weight.to(states.dtype), self.bias)


@torch.no_grad()
def quantize(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the decoder's linear layers by 8-bit ones, in place; returns the model.

    Raises UserError if linear layers have less than half of the weights, as in mixtures of experts.
    """
    linear = [
        (parent, name, child)
        for parent in decoder_layers(model).modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    size = sum(child.weight.numel() for _, _, child in linear)
    total = sum(parameter.numel() for parameter in decoder_layers(model).parameters())
    if size < total / 2:
        raise UserError(
            f"teacher.quantize is 'int8': it is for plain linear layers, and only "
            f"{size / total:.0%} of {type(model).__name__}'s weights are in such"
        )
    for parent, name, child in linear:
        setattr(parent, name, Int8Linear(child))
    return model
