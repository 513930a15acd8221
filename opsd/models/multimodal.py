"""Models of more than text, such as Gemma 3 with its vision tower: only what text runs through
trains.

`AutoModelForCausalLM` gives such a model whole where its checkpoint is (Gemma 3 4B and larger,
Mistral Small 3). Here its decoder and its head run; the rest stays as it is and is saved with it.
"""

from torch import nn
from transformers import PreTrainedModel


def freeze_others(model: PreTrainedModel) -> None:
    """Let no gradient be wanted of what text does not run through: DistributedDataParallel would
    wait for it."""
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
    return [model.get_decoder(), *(end for end in ends if end is not None)]
