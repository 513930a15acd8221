"""The dtype of what a run saves: the base's, unless the config asks for another."""

import json

import pytest
import torch
from helpers.training_cases import logits, write_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from opsd.config.sections import LoraSection, ModelSection, OutputSection
from opsd.models.load import load_model
from opsd.models.lora import add_adapters
from opsd.training.checkpoints import save_trained

pytestmark = pytest.mark.usefixtures("no_report")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def base(directory, dtype, config_says="as the weights"):
    """A model's files in `dtype`; its config may say another, or nothing."""
    file, config = write_model(directory) / "model.safetensors", directory / "config.json"
    state = {name: tensor.to(DTYPES[dtype]) for name, tensor in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    values = json.loads(config.read_text())
    values.pop("dtype", None)
    if config_says is not None:
        values["dtype"] = str(DTYPES[dtype])[6:] if "weights" in config_says else config_says
    config.write_text(json.dumps(values))
    return directory


def trained(section, lora=None):
    model, tokenizer = load_model(section)
    if lora is not None:
        model = add_adapters(model, section.model_copy(update={"lora": lora}))
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 1e-2 * torch.randn(parameter.shape, generator=draw)
    return model, tokenizer


def dtypes(directory):
    files = directory.glob("*.safetensors")
    return {tensor.dtype for file in files for tensor in load_file(file).values()}


@pytest.mark.parametrize(
    ("asked", "stored", "config_says"),
    [
        ("auto", "fp32", "as the weights"),
        ("auto", "bf16", "as the weights"),
        ("auto", "bf16", "float32"),  # the weights are right
        ("auto", "fp16", None),
        ("fp32", "bf16", "as the weights"),
        ("fp16", "fp32", "as the weights"),
    ],
)
def test_a_trained_model_has_the_dtype_of_its_base(asked, stored, config_says, tmp_path):
    section = ModelSection(path=str(base(tmp_path / "base", stored, config_says)))
    model, tokenizer = trained(section)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_trained(model, tokenizer, tmp_path, OutputSection(dtype=asked))
    wanted = DTYPES[stored if asked == "auto" else asked]
    assert dtypes(tmp_path / "model") == {wanted}
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == str(wanted)[6:]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert plain.dtype == wanted
    tied = plain.config.tie_word_embeddings
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    # Each weight is rounded once, and the model in memory is as it was.
    saved = plain.state_dict()
    assert all(torch.equal(saved[name], t.to(wanted)) for name, t in before.items())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.config.dtype == torch.float32 or model.config.dtype == "float32"


@pytest.mark.parametrize(("merge", "asked"), [(False, "auto"), (True, "auto"), (False, "bf16")])
def test_adapters_stay_in_fp32_unless_asked(merge, asked, tmp_path):
    section = ModelSection(path=str(base(tmp_path / "base", "bf16")))
    model, tokenizer = trained(section, LoraSection(rank=2))
    save_trained(model, tokenizer, tmp_path, OutputSection(dtype=asked, merge=merge), None, section)
    adapter = tmp_path / ("adapter" if merge else "model")
    assert dtypes(adapter) == {torch.float32 if asked == "auto" else torch.bfloat16}
    if merge:
        assert dtypes(tmp_path / "model") == {torch.bfloat16}
        with torch.no_grad():
            merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
            difference = logits(merged, [5, 6], [7]) - logits(model.eval(), [5, 6], [7])
        assert difference.abs().max() < 0.05  # bf16's own rounding


def test_a_weight_beyond_fp16_is_not_saved_as_inf(tmp_path):
    section = ModelSection(path=str(base(tmp_path / "base", "fp16")))
    model, tokenizer = trained(section)
    model.model.norm.weight.data[0] = 1e5
    save_trained(model, tokenizer, tmp_path, OutputSection())
    assert dtypes(tmp_path / "model") == {torch.float32}
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "float32"
