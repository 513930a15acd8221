"""Keeps a frozen teacher in CPU memory and copies its layers to the GPU one by one to run them."""

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opsd.common.errors import UserError
from opsd.models.head import decoder_of

CPUTensor = tuple[dict, str, Tensor]
"""(a module's dictionary of tensors, a name in it, that tensor in CPU memory)"""


def offload(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """Keep the decoder's layers in CPU memory; each is on `device` only while it runs.

    The rest of the model is moved to `device`. The model must be frozen: changes that a layer makes
    to its tensors are lost. Returns the model.
    """
    stack = decoder_layers(model)
    layers = dict(stack._modules)
    stack._modules.clear()
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it without its types
    stack._modules.update(layers)
    for layer in layers.values():
        kept = _on_cpu(layer)
        _move(kept)
        layer.register_forward_pre_hook(lambda module, inputs, kept=kept: _move(kept, device))
        layer.register_forward_hook(lambda module, inputs, output, kept=kept: _move(kept))
    return model


def _on_cpu(layer: nn.Module) -> list[CPUTensor]:
    """Copy a layer's tensors to CPU memory, page-locked if a GPU reads it."""
    return [
        (named, name, tensor.cpu().pin_memory() if torch.cuda.is_available() else tensor.cpu())
        for module in layer.modules()
        for named in cast(tuple[dict, ...], (module._parameters, module._buffers))
        for name, tensor in named.items()
        if tensor is not None
    ]


def _move(kept: list[CPUTensor], device: torch.device | str = "cpu") -> None:
    """Move the layer's tensors to this device."""
    for named, name, on_cpu in kept:
        tensor = on_cpu.detach().to(device, non_blocking=True)
        is_parameter = isinstance(named[name], nn.Parameter)
        named[name] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's blocks: its longest ModuleList. Raises UserError where it has none."""
    lists = [m for m in decoder_of(model).children() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise UserError(
            f"teacher.path: {type(model).__name__} has no list of layers to quantize or offload"
        )
    return max(lists, key=len)
