"""A teacher whose weights wait on the CPU and come to the GPU layer by layer."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opsd.common.errors import UserError

Home = tuple[dict[str, Tensor], str, Tensor]
"""A module's dictionary of tensors, a name in it, and the tensor where it is kept."""


def offload(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """Keep the decoder's layers in the CPU's memory; each is on `device` only while it runs.

    The rest of the model is moved to `device`. The model must be frozen: what a layer would change
    of its tensors is lost. Returns the model.
    """
    stack = decoder_layers(model)
    layers = dict(stack._modules)
    stack._modules.clear()
    model.to(device)
    stack._modules.update(layers)
    for layer in layers.values():
        home = _homes(layer)
        _place(home)
        layer.register_forward_pre_hook(lambda module, inputs, home=home: _place(home, device))
        layer.register_forward_hook(lambda module, inputs, output, home=home: _place(home))
    return model


def _homes(layer: nn.Module) -> list[Home]:
    """Where a layer's tensors are kept: in page-locked memory, which a GPU reads faster."""
    return [
        (named, name, tensor.cpu().pin_memory() if torch.cuda.is_available() else tensor.cpu())
        for module in layer.modules()
        for named in (module._parameters, module._buffers)
        for name, tensor in named.items()
        if tensor is not None
    ]


def _place(homes: list[Home], device: torch.device | str = "cpu") -> None:
    for named, name, home in homes:
        tensor = home.detach().to(device, non_blocking=True)
        kind = isinstance(named[name], nn.Parameter)
        named[name] = nn.Parameter(tensor, requires_grad=False) if kind else tensor


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's blocks: its longest list of modules. Raises UserError where it has none."""
    lists = [m for m in model.get_decoder().children() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise UserError(
            f"teacher.path: {type(model).__name__} has no list of layers to quantize or offload"
        )
    return max(lists, key=len)
