"""A model from a GGUF file: the weights it holds, and a directory that plain transformers loads."""

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from opsd.common.errors import UserError
from opsd.config.sections import ModelSection
from opsd.models.load import load_model
from opsd.training.checkpoints import save_model

NAME = "tiny.Q4_1.gguf"
HEADS, LAYERS, WIDTH = 4, 2, 64
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def letters() -> list[str]:
    """The 256 letters of a byte-level tokenizer: each byte as a character that can be seen."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    by_byte = {byte: chr(byte) for byte in seen}
    by_byte |= {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    return [by_byte[byte] for byte in range(256)]


TOKENS = [*letters(), "ab", *SPECIAL]


def interleaved(weight: np.ndarray) -> np.ndarray:
    """Rows of a query or key projection as llama.cpp has them: each rotated pair together."""
    pairs = weight.reshape(HEADS, 2, WIDTH // HEADS // 2, WIDTH)
    return pairs.swapaxes(1, 2).reshape(WIDTH, WIDTH)


def write_gguf(path) -> LlamaForCausalLM:
    """A random Llama with a tied head, its matrices in 4 bits; returns it with what they became."""
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        eos_token_id=len(TOKENS) - 1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token in SPECIAL else normal for token in TOKENS])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(TOKENS) - 2)
    writer.add_eos_token_id(len(TOKENS) - 1)
    writer.add_chat_template(CHAT)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, parameter in model.named_parameters():
        values, theirs = parameter.detach().numpy(), names.get_name(name, (".weight", ".bias"))
        if values.ndim == 1:
            writer.add_tensor(theirs, values)
            continue
        rotated = "q_proj" in name or "k_proj" in name
        stored = gguf.quants.quantize(interleaved(values) if rotated else values, kind)
        writer.add_tensor(theirs, stored, raw_dtype=kind)
        read = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(read))
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gguf")
    return directory, write_gguf(directory / NAME)


def test_a_gguf_file_is_loaded_trained_on_and_saved(files, tmp_path):
    directory, expected = files
    model, tokenizer = load_model(ModelSection(path=str(directory), gguf_file=NAME))
    ids = torch.randint(0, len(TOKENS), (2, 17))
    logits = model(ids).logits
    assert model.dtype == torch.float32 and tokenizer.eos_token == "<|im_end|>"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits, expected(ids).logits, rtol=1e-4, atol=1e-5)
    logits.logsumexp(-1).sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())

    (saved := tmp_path / "saved").mkdir()
    save_model(model, tokenizer, saved)
    plain = AutoModelForCausalLM.from_pretrained(saved / "model")
    again = AutoTokenizer.from_pretrained(saved / "model")
    assert not hasattr(plain.config, "quantization_config")
    assert torch.equal(plain(ids).logits, logits)
    prompt = again.apply_chat_template(
        [{"role": "user", "content": "cab"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    (shown,) = again.batch_decode(prompt["input_ids"])
    assert shown == "<|im_start|>user: cab<|im_end|><|im_start|>"
    assert TOKENS.index("ab") in prompt["input_ids"][0]
    written = plain.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert written.shape[1] > prompt["input_ids"].shape[1]


def test_a_gguf_file_is_read_once(files, monkeypatch):
    """transformers would read its fields four times, and make a table of names for each tensor."""
    calls = []
    for name in ("GGUFReader", "get_tensor_name_map"):
        made = getattr(gguf, name)
        monkeypatch.setattr(gguf, name, lambda *a, make=made: calls.append(make) or make(*a))
    load_model(ModelSection(path=str(files[0]), gguf_file=NAME))
    assert len(calls) == len(set(calls)) == 2


def test_a_gguf_file_that_is_not_named_or_not_one(files, tmp_path):
    directory, _ = files
    with pytest.raises(UserError, match=rf"for a GGUF file set model.gguf_file \({NAME}\)"):
        load_model(ModelSection(path=str(directory)))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(UserError, match=r"model.path is .*it cannot be loaded"):
        load_model(ModelSection(path=str(tmp_path), gguf_file="broken.gguf"))
