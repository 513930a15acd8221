"""The moving average of the trained weights, for teacher.policy: ema."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from opsd.common.errors import UserError
from opsd.models.copies import copy_model, full_tensor
from opsd.models.lora import is_adapted, shared_copy

FILE = "teacher.safetensors"


class MovingAverage:
    """An `ema` teacher: every `every` steps, w ← decay · w + (1 - decay) · student.

    It is in fp32: in bf16, a thousandth of a small difference would round to nothing. Of a model
    with adapters only the adapters are averaged; the other weights are shared with the model.
    """

    def __init__(self, model: PreTrainedModel, decay: float, device: torch.device, every: int = 1):
        self.model, self.decay, self.every = frozen_average(model, device), decay, every
        shared = {id(parameter) for parameter in model.parameters()}
        self.averages = {n: p for n, p in self.model.named_parameters() if id(p) not in shared}

    @torch.no_grad()
    def follow(self, student: nn.Module, step: int) -> None:
        """Update the average after `step` steps, if an update is due."""
        if step % self.every:
            return
        weights = dict(student.named_parameters())
        for name, average in self.averages.items():
            average.lerp_(full_tensor(weights[name]).to(average), 1 - self.decay)

    def save(self, checkpoint: Path) -> None:
        """Write the average into the checkpoint's directory."""
        named = {name: average.contiguous() for name, average in self.averages.items()}
        save_file(named, checkpoint / FILE)

    @torch.no_grad()
    def load(self, checkpoint: Path) -> None:
        """Read what `save` wrote. Raises UserError if the checkpoint has no average."""
        if not (checkpoint / FILE).is_file():
            said = f"holds no average ({FILE}); it was written under another policy"
            raise UserError(f"teacher.policy is 'ema': {str(checkpoint)!r} {said}")
        saved = load_file(checkpoint / FILE)
        for name, average in self.averages.items():
            average.copy_(saved[name])


def frozen_average(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Copy the trainable weights in fp32; of a model with adapters, share the frozen weights."""
    if not is_adapted(model):
        return copy_model(model, torch.float32, device)

    def own(parameter: nn.Parameter) -> nn.Parameter:
        if not parameter.requires_grad:
            return parameter
        return nn.Parameter(parameter.detach().float().clone(), requires_grad=False)

    return shared_copy(model, parameter=own).eval()
