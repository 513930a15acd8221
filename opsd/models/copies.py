"""Makes copies of a model for inference and updates them."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from opsd.models.lora import additions, is_adapted, without_adapters


def contiguous_head(model: PreTrainedModel) -> PreTrainedModel:
    """Make the head copy its input where that is a slice; returns the same model.

    `generate` prefills with hidden[:, -1:, :]. On a CPU, torch 2.13's matmul of that strided view
    copies the [V, D] weight once for each sequence: 1.8 GB and seconds for 32 of them.
    """
    layer = model.get_output_embeddings()
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(),))
    return model


def copy_model(
    model: PreTrainedModel, dtype: torch.dtype, device: torch.device | str | None = None
) -> PreTrainedModel:
    """Make a frozen copy in `dtype` on `device` (None: the model's); tied weights stay tied.

    A model with adapters is copied as it is, each weight in its own dtype.
    """
    device = model.device if device is None else device
    if is_adapted(model):
        inference_copy = copy.deepcopy(model)
        inference_copy.to(device)  # type: ignore[arg-type]  # as in offload
        return inference_copy.requires_grad_(False).eval()
    inference_copy = type(model)._from_config(model.config, dtype=dtype).to(device)
    update_copy(inference_copy, model)
    inference_copy.generation_config = model.generation_config
    return contiguous_head(inference_copy.requires_grad_(False).eval())


@torch.no_grad()
def update_copy(inference_copy: nn.Module, model: nn.Module) -> None:
    """Copy the current weights and buffers of `model` into `inference_copy`; split ones are
    gathered. Of a model with adapters only these are copied: nothing else changes."""
    source, frozen = dict(model.named_parameters()), is_adapted(model)
    for name, parameter in inference_copy.named_parameters():
        if source[name].requires_grad or not frozen:
            parameter.copy_(full_tensor(source[name]))
    buffers = dict(model.named_buffers())
    for name, buffer in inference_copy.named_buffers():
        buffer.copy_(buffers[name])


def named_weights(
    model: PreTrainedModel, dtype: torch.dtype, head_too: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield the current weights under their names in a checkpoint, in `dtype`, with adapters added.
    Tied weights come once. Each tensor is made when the iterator reaches it.

    head_too: yield a tied head under its own name as well.
    """
    added = additions(model) if is_adapted(model) else {}
    plain = without_adapters(model) if added else model
    named = {name: parameter.detach() for name, parameter in plain.named_parameters()}
    converted = revert_weight_conversion(plain, named)
    for name in added.keys() - converted.keys():  # a checkpoint splits experts and renames routers
        named[name] = named[name].float() + added.pop(name)().float()
    last = plain.get_output_embeddings()
    tied = next((n for n, p in plain.named_parameters() if p is getattr(last, "weight", None)), "")
    own = next((f"{n}.weight" for n, module in plain.named_modules() if module is last), tied)
    for name, weight in revert_weight_conversion(plain, named).items():
        if name in added:
            weight = weight.float() + added[name]().float()
        weight = weight.to(dtype)
        yield name, weight
        if head_too and name == tied != own:
            yield own, weight.clone()


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor if it is split over processes, all of which must then call this."""
    if hasattr(tensor, "ds_id"):
        from opsd.distributed import deepspeed  # it imports accelerate, which a plan does not need

        return deepspeed.gathered(tensor)
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
