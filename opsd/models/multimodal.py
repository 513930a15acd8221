"""Models of more than text, such as Qwen3-VL with its vision tower: only the text model trains.

All parts are loaded. Training runs the decoder and the head; the other parts stay unchanged and are
saved with them, so that the saved directory is complete.
"""

from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from opsd.models.head import decoder_of


def auto_class(config: PreTrainedConfig) -> Any:
    """transformers' auto class that loads the model with all its parts. For Llama 4 it is the text
    model's: the whole model's forward fails (5.24: it asks the text model for images)."""
    whole = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and config.model_type != "llama4"
    return AutoModelForImageTextToText if whole else AutoModelForCausalLM


def freeze_others(model: PreTrainedModel) -> None:
    """Freeze the parts that are not used for text: DDP would wait for their gradients."""
    text = {parameter for part in _parts(model) for parameter in part.parameters()}
    for parameter in model.parameters():
        if parameter not in text:
            parameter.requires_grad_(False)


def other_linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that are not used for text."""
    text = {module for part in _parts(model) for module in part.modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in text
    ]


def _parts(model: PreTrainedModel) -> list[nn.Module]:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [decoder_of(model), *(end for end in ends if end is not None)]
