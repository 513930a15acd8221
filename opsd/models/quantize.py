"""A frozen model in less memory: its linear layers in 8 bits, or its layers kept by the CPU.

For teachers, which only run forward. The embedding and the head stay as they are: the loss reads
the head's weight by itself, and a lookup costs nothing.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from opsd.common.errors import UserError
from opsd.models.offload import decoder_layers

LEVELS = 127


class Int8Linear(nn.Module):
    """A linear layer whose weight is w ≈ q · s, q in int8 and s one number a row of w.

    The weight is made again for each product, in the input's dtype: one layer's at a time. The
    rounding is half a step, s / 2 = max |w| / 254 of its row, at most.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        scale = scale / LEVELS
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.to(layer.weight.dtype))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, states: Tensor) -> Tensor:
        """states [..., in] → [..., out]."""
        weight = self.weight.to(self.scale.dtype) * self.scale
        return linear(states, weight.to(states.dtype), self.bias)


@torch.no_grad()
def quantize(model: PreTrainedModel) -> PreTrainedModel:
    """Put the decoder's linear layers in 8 bits, in place; returns the model.

    Raises UserError where most of its layers' weights are elsewhere, as in mixtures of experts.
    """
    linear = [
        (parent, name, child)
        for parent in decoder_layers(model).modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    size = sum(child.weight.numel() for _, _, child in linear)
    whole = sum(parameter.numel() for parameter in decoder_layers(model).parameters())
    if size < whole / 2:
        raise UserError(
            f"teacher.quantize is 'int8': of {type(model).__name__}'s layers only "
            f"{size / whole:.0%} are plain linear layers, which it is for"
        )
    for parent, name, child in linear:
        setattr(parent, name, Int8Linear(child))
    return model
