"""`opsd export` and the model card: what leaves the house loads elsewhere and says what it is."""

import sys

import gguf
import pytest
import torch
import yaml
from helpers.training_cases import quiet, short_config
from huggingface_hub import metadata_load
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opsd.cli.main import main
from opsd.training.run import train

# Stands for llama.cpp's program, with its command line; writes with llama.cpp's own library.
CONVERTER = """
import argparse
import gguf, numpy
from pathlib import Path
from safetensors.numpy import load_file
add = (parser := argparse.ArgumentParser()).add_argument
add("model", type=Path), add("--outfile"), add("--outtype", choices=["auto", "f32", "f16", "q8_0"])
asked = parser.parse_args()
assert (asked.model / "config.json").is_file() and (asked.model / "tokenizer.json").is_file()
writer = gguf.GGUFWriter(asked.outfile, "qwen3")
for name, tensor in load_file(asked.model / "model.safetensors").items():
    kind = numpy.float16 if asked.outtype == "f16" else tensor.dtype
    writer.add_tensor(name, tensor.astype(kind))
writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
"""


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """A run with adapters."""
    directory = tmp_path_factory.mktemp("runs") / "mine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opsd.training.run.write_report", lambda directory: None)
        lora = {"lora": {"rank": 4, "alpha": 64}}
        config = short_config(*files, directory, model=lora, train={"steps": 2, "save_every": 0})
        return train(config, quiet())


def test_merged_adapters_are_the_whole_model(run, tmp_path):
    assert main(["export", str(run), "--merge", "--output", str(tmp_path / "whole")]) == 0
    import peft

    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        wanted = peft.AutoPeftModelForCausalLM.from_pretrained(run / "model")(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")(ids).logits
    assert torch.allclose(found, wanted, atol=1e-5)


def test_gguf_is_written_by_the_converter_of_the_merged_model(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    whole, file = tmp_path / "whole", tmp_path / "mine.gguf"
    assert main(["export", str(run), "--merge", "--output", str(whole)]) == 0
    assert main(["export", str(run), "--gguf", "--type", "f16", "--output", str(file)]) == 0
    tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
    wanted = load_file(whole / "model.safetensors")
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        there = torch.from_numpy(tensor.data.copy()).reshape(wanted[name].shape)
        assert there.dtype == torch.float16 and torch.allclose(
            there.float(), wanted[name], atol=1e-3
        )
    (tmp_path / "convert_hf_to_gguf.py").write_text("raise SystemExit('Model X is not supported')")
    assert main(["export", str(run), "--gguf", "--output", str(tmp_path / "other.gguf")]) == 1
    (tmp_path / "convert_hf_to_gguf.py").write_text("import no_such_module.part")
    assert main(["export", str(run), "--gguf", "--output", str(tmp_path / "other.gguf")]) == 1
    assert "pip install no_such_module\n" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.glob("*.gguf")) == ["mine.gguf"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--gguf"], "no convert_hf_to_gguf.py; clone it (git clone https://github.com/ggml-org/"),
        ([], "say --merge or --gguf"),
        (["--merge", "--type", "f16"], "--type is 'f16': it is for --gguf"),
        (["--merge", "--output", sys.executable], "it exists already; choose another"),
    ],
)
def test_what_cannot_be_is_refused_with_the_mend(words, said, run, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    assert main(["export", str(run), *words]) == 1
    assert said in capsys.readouterr().err


def test_a_whole_model_has_nothing_to_merge(files, capsys):
    assert main(["export", str(files[0]), "--merge"]) == 1
    assert "has no adapters to merge" in capsys.readouterr().err


def test_the_card_says_what_the_model_is(run, files, tmp_path):
    card = run / "model" / "README.md"
    text, about = card.read_text(), metadata_load(card)
    assert about["library_name"] == "peft" and {"opsd-train", "opsd"} <= set(about["tags"])
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings["train"]["steps"] == 2 and settings["model"]["lora"]["rank"] == 4
    assert "| 0 | 0.000 | 0.000 to 0.490 |" in text and "4 problems" in text
    assert str(files[0].parent) not in text  # nobody's directories
    (files[0] / "README.md").write_text("---\nlicense: mit\n---\n")
    try:
        config = short_config(
            *files, tmp_path / "run", train={"steps": 1}, eval={"problems": 0, "every": 0}
        )
        train(config, quiet())
    finally:
        (files[0] / "README.md").unlink()
    again = tmp_path / "run" / "model" / "README.md"
    assert metadata_load(again)["license"] == "mit" and "None was measured." in again.read_text()
    card.write_text("edited by its owner")  # which is no damage
    assert main(["export", str(run), "--merge", "--output", str(tmp_path / "whole")]) == 0
