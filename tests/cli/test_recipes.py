"""A config that goes on with `then`: several runs by one command."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers.training_cases import quiet, short_values
from safetensors.torch import load_file

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.config.load import load_config, load_recipe
from opsd.training.run import train

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "opsd-then-grpo.yaml"
THEN = {"loss": {"divergence": "jsd"}, "train": {"learning_rate": 2e-3}}


@pytest.fixture
def recipe(files, tmp_path):
    values = short_values(*files, tmp_path / "run") | {"teacher": {"policy": "live"}}
    values["train"]["steps"] = 2
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values | {"then": THEN}))
    return tmp_path / "recipe.yaml"


def weights(directory):
    return load_file(directory / "model" / "model.safetensors")


def test_a_recipe_is_its_runs_one_after_the_other(recipe, tmp_path, capsys):
    first, second = load_recipe(recipe)
    assert second.model.path == str(tmp_path / "run" / "model")
    assert (second.teacher.policy, second.loss.divergence) == ("initial", "jsd")
    assert second.prompts == first.prompts and second.train.problems_per_step == 3
    assert main(["train", str(recipe), "--dry-run"]) == 0
    assert not (tmp_path / "run").exists()
    assert main(["train", str(recipe)]) == 0
    again = second.model_copy(deep=True)
    again.output.dir = str(tmp_path / "by-itself")
    alone = weights(train(again, quiet()))
    there = weights(tmp_path / "run-then")
    assert all(torch.equal(alone[name], tensor) for name, tensor in there.items())
    moved = [not torch.equal(t, there[n]) for n, t in weights(tmp_path / "run").items()]
    assert any(moved)
    capsys.readouterr()
    shutil.rmtree(tmp_path / "run")
    assert main(["train", str(recipe)]) == 1
    assert "run-then': this run has been started before" in capsys.readouterr().err


def test_an_interrupted_recipe_goes_on_in_its_second_run(recipe, tmp_path, capsys):
    train(load_recipe(recipe)[0], quiet())
    before = (tmp_path / "run" / "summary.json").stat().st_mtime_ns
    assert main(["train", str(recipe), "--resume"]) == 0
    assert f"{tmp_path / 'run'} is done" in "".join(capsys.readouterr())
    assert (tmp_path / "run" / "summary.json").stat().st_mtime_ns == before
    assert (tmp_path / "run-then" / "summary.json").is_file()


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ("grpo", "then is 'grpo'"),
        ({"method": "grpo"}, "then: rollout.group_size is 1"),
        ({"method": "grpo", "rolout": {}}, "then: unknown key 'rolout'"),
        ({"output": {"dir": "same"}}, "then: output.dir is 'same', an earlier run's"),
    ],
)
def test_all_runs_are_checked_before_the_first(then, said, files, tmp_path):
    values = short_values(*files, "same") | {"then": then}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=said):
        load_recipe(tmp_path / "c.yaml")


def test_the_example_is_a_recipe():
    first, second = load_recipe(EXAMPLE, ["then.train.steps=7"])
    assert (first.method, second.method, second.train.steps) == ("opsd", "grpo", 7)
    with pytest.raises(UserError, match="a recipe of 2 runs"):
        load_config(EXAMPLE)
