"""generation_config.json as models ship it: its stops are used, the rest is kept and not obeyed."""

import json

import pytest
from helpers.training_cases import write_model
from transformers import AutoModelForCausalLM, GenerationConfig

from opsd.models.generation_config import as_shipped, keep_stop_tokens, left_out, mended

SHIPPED = {
    "Llama 2, Vicuna": {"temperature": 0.9, "top_p": 0.6},
    "Qwen 2.5": {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_penalty": 1.05,
    },
    "beams without beams": {"early_stopping": True, "length_penalty": 2.0},
    "a pad token of -1": {"pad_token_id": -1, "temperature": 0.5},
    "no n-grams": {
        "no_repeat_ngram_size": 3,
        "num_beams": 4,
        "max_time": 0.1,
        "stop_strings": ["So"],
    },
    "both": {"do_sample": False, "temperature": 0.6, "top_k": 50, "early_stopping": True},
    "plain": {},
}


@pytest.mark.parametrize("name", SHIPPED)
def test_what_a_model_ships_can_be_written_and_is_not_obeyed(name, tmp_path):
    shipped = SHIPPED[name]
    write_model(tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    eos = json.loads(file.read_text()).get("eos_token_id", 2) if file.exists() else 2
    file.write_text(json.dumps({"eos_token_id": eos, **shipped}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    keep_stop_tokens(model)
    told = left_out(model) or ""
    for key in ("temperature", "repetition_penalty", "no_repeat_ngram_size", "num_beams"):
        assert (f"{key} {shipped[key]}" in told) if key in shipped else (f"{key} " not in told)
    assert model.generation_config.eos_token_id == eos
    drawing = model.generation_config.to_diff_dict().keys()
    assert drawing <= {"eos_token_id", "pad_token_id", "bos_token_id", "transformers_version"}
    model.save_pretrained(tmp_path / "checkpoint")
    with as_shipped(model):
        model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    again.save_pretrained(tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    for key in ("temperature", "top_p", "repetition_penalty", "no_repeat_ngram_size"):
        assert kept.get(key) == shipped.get(key)


def test_a_valid_config_stays_as_it_is():
    config = GenerationConfig(do_sample=True, temperature=0.7)
    assert mended(config) is config


def test_what_is_off_is_not_told(tmp_path):
    """SmolLM2's says output_attentions false, which draws nothing."""
    write_model(tmp_path)
    shipped = {"eos_token_id": 1, "output_attentions": False, "do_sample": False}
    (tmp_path / "generation_config.json").write_text(json.dumps(shipped))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    keep_stop_tokens(model)
    assert left_out(model) is None


def test_what_is_corrected_is_told(tmp_path):
    """transformers' StaticCache with use_cache false, which it would not write."""
    write_model(tmp_path)
    shipped = {"eos_token_id": 1, "cache_implementation": "static", "use_cache": False}
    (tmp_path / "generation_config.json").write_text(json.dumps(shipped))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    keep_stop_tokens(model)
    said = left_out(model)
    assert "says cache_implementation static:" in said and "do_sample True" not in said
    assert "saved with another cache_implementation" in said
