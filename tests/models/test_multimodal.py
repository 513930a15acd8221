"""Models of more than text: their decoder trains, with shared prefixes; the rest is left alone."""

import pytest
import torch
from helpers.lines import read_lines
from helpers.prefix_models import assert_same, make_groups
from helpers.tiny_models import tiny_model
from helpers.training_cases import quiet, short_config, write_rows
from safetensors.torch import load_file
from transformers import AutoConfig, Gemma3Config, Gemma3ForConditionalGeneration

from opsd.models.load import load_model
from opsd.models.multimodal import auto_class
from opsd.prefix import shared_prefix_hidden_states, unpackable
from opsd.quickstart import tiny_model as tiny
from opsd.training.checkpoints import save_model
from opsd.training.run import train


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Gemma 3 as its larger checkpoints are: with a vision tower, window and whole layers."""
    directory, tokenizer = tmp_path_factory.mktemp("base"), tiny.make_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 7,
        "max_position_embeddings": 256,
        "layer_types": ["sliding_attention", "full_attention"],
        **ends,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1, **ends)
    Gemma3ForConditionalGeneration(config).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    return directory / "model", write_rows(directory / "rows.jsonl")


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}])
def test_gemma_3_with_its_vision_tower_trains_its_text(lora, files, tmp_path):
    config = short_config(
        *files,
        tmp_path / "run",
        model={"lora": lora},
        rollout={"group_size": 2},
        train={"steps": 2, "save_every": 0},
        eval={"problems": 2, "samples": 1},
        output={"merge": lora is not None},
    )
    train(config, quiet())
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[0]["sharing_difference"] < 1e-5 and lines[0]["token_ratio"] > 1.5
    before, after = (
        load_file(place / "model.safetensors") for place in (files[0], tmp_path / "run" / "model")
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("vision" in name or "projector" in name for name in changed)


def test_what_text_does_not_run_through_wants_no_gradient(files):
    model, _ = load_model(short_config(*files, files[0]).model)
    wants = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all("vision" in name or "projector" in name for name in frozen)
    assert wants and not any("vision" in name or "projector" in name for name in wants)


@pytest.mark.parametrize(
    "model_type",
    ["qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "qwen3_5", "gemma4", "mistral3", "llama4"],
)
def test_models_with_images_are_loaded_whole_and_saved_as_what_they_were(model_type, tmp_path):
    made = tiny_model(model_type)
    made.save_pretrained(tmp_path / "model")
    tiny.make_tokenizer().save_pretrained(tmp_path / "model")
    model, tokenizer = load_model(short_config(tmp_path / "model", tmp_path, tmp_path).model)
    assert type(model) is type(made)
    if unpackable(model) is None:
        groups = make_groups()
        assert_same(model, shared_prefix_hidden_states(model, groups), groups)
    save_model(model, tokenizer, tmp_path, "saved")
    kind = auto_class(AutoConfig.from_pretrained(tmp_path / "saved"))
    again, told = kind.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert type(again) is type(made) and not any(told.values())
    assert again.state_dict().keys() == made.state_dict().keys()
