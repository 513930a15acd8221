"""What some families' configs say that would stop a run: it is left out, or one line."""

import json

import pytest
import torch
from helpers.tiny_models import tiny_model
from helpers.training_cases import short_config, write_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from opsd.common.errors import UserError
from opsd.config.sections import ModelSection
from opsd.data.chat import token_ids
from opsd.models.experts import untrained
from opsd.models.load import load_model, stop_ids, told_stops
from opsd.models.lora import add_adapters
from opsd.rollout import GenerateSampler, Sampling
from opsd.training.checkpoints import save_model

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
    (said,) = untrained(model)
    assert "output_router_logits: its routers train by the run's loss alone" in said
    save_model(model, tokenizer, tmp_path, "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").output_router_logits
    assert not model.config.output_router_logits


def test_adapters_say_that_they_train_no_experts():
    lora = ModelSection(path="x", lora={"rank": 2, "alpha": 4})
    assert untrained(add_adapters(tiny_model("mixtral"), lora)) == []
    model = tiny_model("gpt_oss")
    sizes = sum(p.numel() for n, p in model.named_parameters() if "experts" in n and p.ndim == 3)
    (said,) = untrained(add_adapters(model, lora))
    assert sizes and f"none of the experts, {sizes:,} of" in said


@pytest.mark.parametrize("says", [False, True])
def test_a_model_without_sdpa_is_told_of_eager(says, tmp_path, monkeypatch):
    """Gemma 2 caps attention's scores. In transformers 5.17 it says that it supports sdpa."""
    section = section_of(Gemma2ForCausalLM, Gemma2Config, tmp_path, head_dim=8)
    monkeypatch.setattr(Gemma2ForCausalLM.__mro__[1], "_supports_sdpa", says)  # of all its parts
    with pytest.raises(UserError, match=r"set model\.attention to 'eager' for it"):
        load_model(section.model_copy(update={"attention": "sdpa"}))
    model, _ = load_model(section)  # auto
    assert model.config._attn_implementation == "eager"


def edited(path, **values):
    """A JSON file with these fields; None takes one out."""
    fields = {**(json.loads(path.read_text()) if path.exists() else {}), **values}
    path.write_text(json.dumps({name: v for name, v in fields.items() if v is not None}))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda path: edited(path / "config.json", vocab_size=1000), "of another shape.*embed_tok"),
        (
            lambda path: edited(path / "config.json", _attn_implementation="flash_attention_2"),
            "set model.attention to 'sdpa'",
        ),
        (
            lambda path: [file.unlink() for file in path.glob("*token*.json")],
            "tokenizer knows no text",
        ),
        (
            lambda path: edited(
                path / "tokenizer.json", normalizer={"type": "Prepend", "prepend": "1" * 10**6}
            ),
            "tokenizer makes 1,000,00. tokens of '1 [+] 1'",
        ),
    ],
    ids=["rows", "attention", "no tokenizer", "a long tokenizer"],
)
def test_what_transformers_does_not_say_is_one_line(change, said, tmp_path):
    write_model(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=said):
        load_model(short_config(tmp_path, tmp_path, tmp_path).model)


def test_stops_that_are_no_tokens_and_a_template_in_a_file_of_its_own(tmp_path):
    write_model(tmp_path)
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    edited(tmp_path / "generation_config.json", eos_token_id=[-1, 9999])
    model, tokenizer = load_model(short_config(tmp_path, tmp_path, tmp_path).model)
    assert tokenizer.chat_template == template
    stops = stop_ids(model, tokenizer)
    assert stops == {tokenizer.eos_token_id, 9999}
    assert told_stops(tokenizer, stops).endswith(", 9999")


def test_a_head_of_its_own_beside_a_config_that_ties_it_stays_so(tmp_path):
    """transformers leaves them apart; what reads the config alone would tie them."""
    torch.manual_seed(0)
    path = tmp_path / "model"
    write_model(path)
    state = load_file(path / "model.safetensors")
    state["lm_head.weight"] = torch.randn_like(state["model.embed_tokens.weight"])
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    assert AutoConfig.from_pretrained(path).tie_word_embeddings
    model, tokenizer = load_model(ModelSection(path=str(path)))
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])
    save_model(model, tokenizer, tmp_path, "saved")
    assert not AutoConfig.from_pretrained(tmp_path / "saved").tie_word_embeddings


def test_a_template_s_tokens_are_tokens_whatever_the_tokenizer_says_of_text(tmp_path):
    """split_special_tokens would spell `<|im_end|>` out, so that no turn ends."""
    path = write_model(tmp_path / "model")
    tokenizer = load_model(ModelSection(path=str(path)))[1]
    text = f"1{tokenizer.eos_token}2"
    wanted = token_ids(tokenizer, text)
    tokenizer.split_special_tokens = True
    assert tokenizer.eos_token_id in wanted and token_ids(tokenizer, text) == wanted
