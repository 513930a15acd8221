"""Another model with the same vocabulary."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from opsd.quickstart import tiny_model as tiny


@pytest.fixture(scope="module")
def wider(tmp_path_factory):
    """A teacher of another width, its vocabulary padded to a round size."""
    directory = tmp_path_factory.mktemp("wider")
    torch.manual_seed(5)
    tokenizer = tiny.make_tokenizer()
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64 + 64,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
