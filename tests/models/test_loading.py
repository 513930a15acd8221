"""What some families' configs say that would stop a run: it is left out, or one line."""

import pytest
import torch
from helpers.training_cases import short_config, write_model
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from opsd.common.errors import UserError
from opsd.models.load import load_model, stop_ids
from opsd.rollout import GenerateSampler, Sampling

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def section_of(model, config, directory, **more):
    """The section of a new model of this class, beside the tests' tokenizer."""
    write_model(directory)
    size = len(AutoTokenizer.from_pretrained(directory))
    torch.manual_seed(0)
    model(config(vocab_size=size, **SIZES, **more)).save_pretrained(directory)
    return short_config(directory, directory, directory).model


def test_a_router_s_logits_are_asked_of_no_single_token(tmp_path):
    """transformers makes a loss of them, and cannot where the cache has the tokens before."""
    more = {"output_router_logits": True, "num_local_experts": 2}
    section = section_of(MixtralForCausalLM, MixtralConfig, tmp_path, **more)
    model, tokenizer = load_model(section)
    sampler = GenerateSampler(model, stop_ids(model, tokenizer))
    assert all(rollout.ids for rollout in sampler.sample([[5, 6, 7], [5]], Sampling(4)))


def test_a_model_without_sdpa_is_told_of_eager(tmp_path):
    section = section_of(Gemma2ForCausalLM, Gemma2Config, tmp_path, head_dim=8)
    with pytest.raises(UserError, match=r"set model\.attention to 'eager' for it"):
        load_model(section)
    load_model(section.model_copy(update={"attention": "eager"}))
