"""The part of a causal model that ends in hidden states."""

from typing import cast

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head, adapters included.

    transformers' get_decoder (5.24) answers with the whole model for Llama 4 and with a layer of
    the head for ModernBERT's decoder.
    """
    found: nn.Module = model.get_decoder()
    if isinstance(found, PreTrainedModel) and found.get_output_embeddings() is None:
        return found
    whole = getattr(model, "get_base_model", lambda: model)()  # peft's wrapper has one
    return cast(PreTrainedModel, whole.model)


def attention_shapes(config: PreTrainedConfig) -> list[tuple[int, int, int]]:
    """(heads, key heads, width of a head) of each layer; Gemma 4's layers differ."""
    text = config.get_text_config()
    layers = [text] * text.num_hidden_layers
    if getattr(text, "is_heterogeneous", False):
        layers = list(text.per_layer_config)
    return [
        (
            layer.num_attention_heads,
            getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads,
            getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads,
        )
        for layer in layers
    ]


def best_attention(config: PreTrainedConfig) -> str:
    """transformers' attention for a model of this architecture: sdpa, or eager where the model has
    no other that runs anywhere, as gpt-oss. On a GPU torch's sdpa runs flash attention itself.
    """
    try:
        found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:  # a repository's own class
        return "sdpa"
    kind = found[0] if isinstance(found, tuple | list) else found
    return "sdpa" if kind._supports_sdpa else "eager"
