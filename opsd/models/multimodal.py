"""Models of more than text, such as Gemma 3 with its vision tower: only the text model trains.

`AutoModelForCausalLM` loads such a checkpoint with all its parts (Gemma 3 4B and larger, Mistral
Small 3). Training runs the decoder and the head; the other parts do not change and are saved too.
"""

from torch import nn
from transformers import PreTrainedModel

from opsd.models.head import decoder_of


def freeze_others(model: PreTrainedModel) -> None:
    """Freeze the parts that text does not run through. DistributedDataParallel would wait for their
    gradients."""
    text = {parameter for part in _parts(model) for parameter in part.parameters()}
    for parameter in model.parameters():
        if parameter not in text:
            parameter.requires_grad_(False)


def other_linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that text does not run through."""
    text = {module for part in _parts(model) for module in part.modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in text
    ]


def _parts(model: PreTrainedModel) -> list[nn.Module]:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [decoder_of(model), *(end for end in ends if end is not None)]
