"""Code beside a model, and kernels that its config names, run only where the user says so."""

import json

import pytest
import torch
from helpers.image_models import write_image_model
from helpers.strangers import AUTO, CODE, copied, refused
from safetensors.torch import save_file

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.config.sections import ModelSection
from opsd.models.images import ImageReader
from opsd.models.load import check_directory, load_config, load_tokenizer


def test_a_models_code_runs_only_where_the_user_says_so(
    with_code, files, train, marker, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks in the terminal"))
    assert train(f"model.path={with_code}") == 1
    refused(capsys, "model.trust_remote_code is false")
    assert train(f"model.path={with_code}", "--dry-run") == 1
    refused(capsys, "model.path is")
    assert main(["plan", str(with_code)]) == 1
    refused(capsys, "model.path is")
    for words in (
        ["eval", str(with_code), "--benchmark", str(files[1])],
        ["chat", str(with_code)],
        ["serve-teacher", str(with_code), "--port", "0"],
    ):
        assert main(words) == 1
        assert "MODEL" in capsys.readouterr().err.splitlines()[-1]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": str(with_code), "peft_type": "LORA", "r": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    assert main(["export", str(adapter), "--merge"]) == 1
    assert "trust_remote_code is false" in capsys.readouterr().err
    assert not marker.exists()
    with pytest.raises(SystemExit, match="7"):
        train(f"model.path={with_code}", "model.trust_remote_code=true", "--dry-run")
    assert marker.exists()


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("attn_implementation", "somebody/a-kernel", 1),
        ("attn_implementation", {"": "paged|somebody/a-kernel@main:f"}, 1),
        ("_attn_implementation", "somebody/a-kernel", 1),
        ("experts_implementation", "sonicmoe", 1),
        ("attn_implementation", "flash_attention_2", 0),  # taken from the hub where it is absent
        ("attn_implementation", "eager", 0),
    ],
)
def test_a_models_config_names_no_kernel_to_run(
    field, value, code, files, tmp_path, capsys, monkeypatch
):
    """transformers loads kernels, which are code, from the hub, where `kernels` is installed."""
    loads = lambda *_, **__: pytest.fail("it loads a kernel")  # noqa: E731
    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda *_: True)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", loads)
    model = copied(files, tmp_path / "model")
    values = json.loads((model / "config.json").read_text()) | {field: value}
    (model / "config.json").write_text(json.dumps(values))
    asked = ["--benchmark", str(files[1]), "--problems", "1", "--max-new-tokens", "2"]
    lengths = ["--prompt-tokens", "9", "--solution-tokens", "9", "rollout.max_new_tokens=9"]
    for words in (
        ["eval", str(model), *asked, "--output", str(tmp_path / "e")],
        ["plan", str(model), *lengths],
    ):
        assert main(words) == code
        if code:
            assert "a kernel from the hub is code" in capsys.readouterr().err.splitlines()[-1]


def test_a_processor_of_images_runs_no_code(tmp_path, marker):
    model = write_image_model(tmp_path / "model")
    values = json.loads((model / "preprocessor_config.json").read_text())
    values |= {"auto_map": {"AutoImageProcessor": "evil.Processor"}, "image_processor_type": "Evil"}
    (model / "preprocessor_config.json").write_text(json.dumps(values))
    (model / "evil.py").write_text(CODE.format(marker=str(marker)))
    section = ModelSection(path=str(model))
    config, tokenizer = load_config(check_directory(section, "model")), load_tokenizer(section)
    with pytest.raises(UserError, match="it has no processor of images"):
        ImageReader(section, config, tokenizer, "model")
    assert not marker.exists()


def test_a_converter_runs_no_models_code(files, tmp_path, capsys, monkeypatch):
    """llama.cpp's own trusts the code of whatever it converts."""
    model = copied(files, tmp_path / "model")
    values = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(values | {"auto_map": AUTO}))
    (tmp_path / "convert_hf_to_gguf.py").touch()
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    monkeypatch.setattr("opsd.cli.export._convert", lambda *_: pytest.fail("it runs"))
    assert main(["export", str(model), "--gguf"]) == 1
    refused(capsys, "tokenizer_config.json has code (auto_map)")
    assert sorted(model.glob(".*")) == []
