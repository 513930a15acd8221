"""What could be trained but not saved is said before the first step."""

import json
import resource
import shutil

import pytest
import torch
import yaml
from helpers.training_cases import load_student, short_config, short_values

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.config.load import merge
from opsd.models.load import load_model
from opsd.models.lora import add_adapters
from opsd.training.preflight import try_saving

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def asked(files, tmp_path):
    """Runs the trial on a changed model or tokenizer; the error's text, None where it passes."""
    (tmp_path / "run").mkdir()
    config = short_config(*files, tmp_path / "run", train={"save_every": 1})
    model, tokenizer = load_model(config.model)

    def ask(change=lambda model, tokenizer: None, adapted=False):
        nonlocal model
        change(model, tokenizer)
        if adapted:
            lora = short_config(*files, tmp_path / "run", model={"lora": {"rank": 2}}).model
            model = add_adapters(model, lora)
        try:
            try_saving(config, model, tokenizer, keeps_base=False)
        except UserError as error:
            assert not list((tmp_path / "run").iterdir())
            return str(error)
        assert not list((tmp_path / "run").iterdir())

    return ask


def test_what_can_be_saved_passes_and_leaves_nothing(asked):
    assert asked() is None
    assert asked(adapted=True) is None


def shared(model, tokenizer):
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight


def with_a_set(model, tokenizer):
    model.config.custom = {"a": {1, 2}}


def with_a_path(model, tokenizer):
    tokenizer.chat_template = {"default": "x", "../../evil": "y"}


def with_a_surrogate(model, tokenizer):
    tokenizer.chat_template = "\ud800"


def with_a_set_in_the_tokenizer(model, tokenizer):
    tokenizer.init_kwargs["custom"] = {1, 2}


def of_another_class(model, tokenizer):
    """A byte-level tokenizer that says it is Llama's: AutoTokenizer then builds that."""
    tokenizer.__class__ = type("LlamaTokenizer", (type(tokenizer),), {})


def of_a_kind_that_nobody_knows(model, tokenizer):
    """As of a repository's own code, which is not saved with the model."""
    kind = type("Config", (type(model.config),), {"model_type": "nobody"})
    model.config.__class__ = kind


CANNOT = {
    shared: "shared tensors",
    with_a_set: "not JSON serializable",
    with_a_path: "Invalid chat template name: '../../evil'",
    with_a_surrogate: "UnicodeEncodeError",
    with_a_set_in_the_tokenizer: "not JSON serializable",
    of_another_class: "its tokenizer is another one when it is read again",
    of_a_kind_that_nobody_knows: "nobody",
}


@pytest.mark.parametrize("change", CANNOT, ids=lambda change: change.__name__)
def test_what_transformers_would_refuse_to_write_or_read_is_said(change, asked):
    said = asked(change)
    assert "could be trained but not saved" in said and CANNOT[change] in said
    assert "\n" not in said


def test_a_limit_of_file_sizes_is_found_for_the_largest_file(asked):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))  # the moments take more
    try:
        assert "ulimit -f" in asked()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_it_comes_before_the_first_rollout(files, tmp_path, capsys, monkeypatch):
    """A template in additional_chat_templates of a model as the hub has it; with no step done."""
    model = shutil.copytree(files[0], tmp_path / "model")
    (model / "chat_template.jinja").unlink(missing_ok=True)
    values = json.loads((model / "tokenizer_config.json").read_text())
    template = load_student(files)[1].chat_template
    named = [{"name": "default", "template": template}, {"name": "a/b", "template": "x"}]
    (model / "tokenizer_config.json").write_text(json.dumps(values | {"chat_template": named}))
    values = merge(short_values(*files, tmp_path / "run"), {"model": {"path": str(model)}})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(tmp_path / "c.yaml")]) == 1
    assert "'a/b'" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()
    assert torch.is_grad_enabled()
