"""The decoder of a causal model, and what its layers' attention is like, in today's families."""

import peft
import pytest
import torch
import transformers
from helpers.prefix_models import GPT_OSS, SIZES, gemma_4
from transformers import AutoModelForCausalLM

from opsd.config.sections import ModelSection
from opsd.models.head import attention_shapes, decoder_of
from opsd.models.load import best_attention, load_model
from opsd.quickstart.tiny_model import make_tokenizer

GEMMA_4 = gemma_4(["sliding_attention", "sliding_attention", "full_attention"] * 2)

LLAMA_4 = transformers.Llama4TextConfig(
    **SIZES,
    head_dim=8,
    intermediate_size_mlp=48,
    num_local_experts=2,
    layer_types=["full_attention"] * 2,
)
MODERN_BERT = transformers.ModernBertDecoderConfig(
    **SIZES, cls_token_id=3, sep_token_id=4, layer_types=["full_attention"] * 2
)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (transformers.Qwen3Config(**SIZES), "Qwen3Model"),
        (LLAMA_4, "Llama4TextModel"),
        (MODERN_BERT, "ModernBertDecoderModel"),
        (GEMMA_4, "Gemma4TextModel"),
    ],
)
def test_the_decoder_gives_hidden_states(config, name):
    model = AutoModelForCausalLM.from_config(config)
    decoder = decoder_of(model)
    assert type(decoder).__name__ == name
    with torch.no_grad():
        states = decoder(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False).last_hidden_state
    assert states.shape == (1, 3, SIZES["hidden_size"])


def test_the_decoder_under_adapters():
    for config in (transformers.Qwen3Config(**SIZES), LLAMA_4):
        model = AutoModelForCausalLM.from_config(config)
        decoder = decoder_of(model)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
        assert decoder_of(adapted) is decoder


def test_layers_whose_heads_differ():
    assert attention_shapes(GEMMA_4) == [(4, 2, 8), (4, 2, 8), (4, 2, 16)] * 2
    assert attention_shapes(transformers.Qwen3Config(**SIZES, head_dim=12)) == [(4, 2, 12)] * 2
    without = {key: SIZES[key] for key in SIZES if key != "num_key_value_heads"}
    assert attention_shapes(transformers.OPTConfig(**without)) == [(4, 4, 8)] * 2
    mamba = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2)
    assert attention_shapes(mamba) == [(0, 0, 0)] * 2


def test_attention_is_the_best_that_a_model_has(tmp_path):
    assert best_attention(transformers.Qwen3Config(**SIZES)) == "sdpa"
    assert best_attention(GPT_OSS) == "eager"
    AutoModelForCausalLM.from_config(GPT_OSS).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(ModelSection(path=str(tmp_path)))
    assert model.config._attn_implementation == "eager"
