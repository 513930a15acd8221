"""Every method's example passes a dry run, and trains on a tiny model in its own setting."""

import json
from pathlib import Path

import pytest
import yaml
from helpers.lines import read_lines
from helpers.machines import FITS
from helpers.training_cases import quiet, write_model, write_rows

from opsd.cli.main import main
from opsd.common.templates import fill_in
from opsd.config.load import load_config
from opsd.quickstart.recipe import method_config
from opsd.quickstart.settings import Asked
from opsd.quickstart.smollm2_recipe import smollm2_recipe
from opsd.training.run import train

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STUDY = (EXAMPLES / "gsm" / "study.sh").read_text()
NEIGHBOURS = ("sdft", "sdpo", "opcd", "opsdc", "rlsd")
NAMES = (*NEIGHBOURS, "dapo", "dr-grpo")

VERIFIER = """
def grade(completion, row):
    right = sum(character.isdigit() for character in completion) > 2
    return float(right), "" if right else "more digits"
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model that has positions for whole prompts, and rows of all columns."""
    directory = tmp_path_factory.mktemp("base")
    model = write_model(directory / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    (directory / "mine.py").write_text(VERIFIER)
    return model, write_rows(directory / "rows.jsonl")


def small(name: str, files, directory: Path) -> list[str]:
    """The overrides that make of an example a run of seconds, its own setting left."""
    config = load_config(EXAMPLES / f"{name}.yaml")
    group = min(config.rollout.group_size, 4)
    overrides = {
        "model.path": str(files[0]),
        "data.source": str(files[1]),
        "data.columns": {},
        "rollout.engine": "generate",
        "rollout.group_size": group,
        "rollout.max_new_tokens": 6,
        "train.steps": 3,
        "train.problems_per_step": 4,
        "train.mini_batches": min(config.train.mini_batches, 2),
        "train.learning_rate": 1e-3,
        "train.warmup_steps": 0,
        "train.precision": "fp32",
        "train.gradient_checkpointing": False,
        "train.save_every": 0,
        "eval.problems": min(config.eval.problems, 4),
        "output.dir": str(directory),
    }
    if config.loss.credit_steps:
        overrides["loss.credit_steps"] = 4
    if config.loss.reward.overlong_buffer:
        overrides["loss.reward.overlong_buffer"] = 4
    if config.method == "grpo" or name == "sdpo":
        overrides["loss.reward.verifier"] = f"{files[0].parent / 'mine.py'}:grade"
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]


def test_every_example_has_a_dry_run():
    """Here or in test_machines.py; files without a model are studies, tested in test_study.py."""
    values = {path.stem: yaml.safe_load(path.read_text()) for path in EXAMPLES.glob("*.yaml")}
    assert {name for name, config in values.items() if "model" in config} == {
        *NAMES,
        *FITS,
        "mine",
        "opsd-then-grpo",
    }


@pytest.mark.parametrize("name", NAMES)
def test_an_example_passes_a_dry_run(name, files, tmp_path, capsys):
    arguments = ["train", str(EXAMPLES / f"{name}.yaml"), *small(name, files, tmp_path / "run")]
    assert main([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "Tokens of contexts" in shown and "Tokens a step" in shown and "Memory" in shown
    assert "The student's context of the first row" in shown and "Nothing was trained" in shown
    assert ("The teacher's context" in shown) == (name in NEIGHBOURS)
    assert not (tmp_path / "run").exists()


GSM = ("cold-start", "teacher", "opsd", "grpo", "sft", "distill")


@pytest.mark.parametrize("name", GSM)
def test_the_gpu_studys_runs_pass_a_dry_run(name, files, tmp_path, capsys):
    path = EXAMPLES / "gsm" / f"{name}.yaml"
    assert f"examples/gsm/{name}.yaml" in STUDY or f" {name}" in STUDY
    overrides = [f"model.path={files[0]}", "data.size=40", "train.problems_per_step=8"]
    overrides += ["train.precision=fp32", "eval.problems=8", f"output.dir={tmp_path / 'run'}"]
    if name == "distill":
        overrides.append(f"teacher.path={files[0]}")
    overrides += ["prompts.too_long=skip", "rollout.max_new_tokens=16"]
    assert main(["train", str(path), *overrides, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "The student's context of the first row" in shown and "Nothing was trained" in shown
    if name in ("cold-start", "teacher", "sft"):  # the task's mark is gone, the answer boxed
        row = {"solution": "2 + 2 = 4 items\n#### 4", "answer": "4"}
        (text,) = fill_in(load_config(path).prompts.target, [row])
        assert text == "2 + 2 = 4 items\n\nThe answer is \\boxed{4}."


@pytest.mark.parametrize("name", NAMES)
def test_an_example_trains(name, files, tmp_path):
    config = load_config(EXAMPLES / f"{name}.yaml", small(name, files, tmp_path / "run"))
    lines = read_lines(train(config, quiet()) / "metrics.jsonl")
    assert len(lines) == 3 and all(line["grad_norm"] > 0 for line in lines)
    last = lines[-1]
    if config.method == "opsd":
        assert last["divergence"] > 0
    else:
        assert last["informative_groups"] > 0 and 0 < last["correct_fraction"] < 1
    # What is the neighbour's own.
    if name == "sdft":
        assert last["trained_tokens"] < last["generated_tokens"]  # the first tokens do not count
    if name == "sdpo":
        assert 0 < last["taught_fraction"] <= 1
    if name == "rlsd":
        assert lines[0]["credit_moved"] > lines[2]["credit_moved"] > 0  # less at each step
    if name == "dapo":
        assert max(line["ratio_clipped_fraction"] for line in lines) > 0
        assert last["informative_groups"] == 1  # or others were drawn


def test_the_quickstarts_example_is_what_the_quickstart_runs():
    example = load_config(EXAMPLES / "smollm2.yaml").model_dump()
    recipe = smollm2_recipe(Asked())
    ran = method_config(recipe, "opsd", Path("runs/quickstart"), 0, quiet()).model_dump()
    differ = {
        (section, name): (value, ran[section][name])
        for section, values in example.items()
        if section != "method"
        for name, value in values.items()
        if value != ran[section][name]
    }
    # A run that is trained by itself is saved on its way, and asks its teacher at the start.
    assert differ == {
        ("train", "save_every"): (13, 0),
        ("eval", "teacher"): (True, False),
        ("output", "dir"): ("runs/smollm2", "runs/quickstart/opsd"),
    }
    assert example["method"] == ran["method"]


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["prompts.teacher={{ hint }}"], "prompts.teacher cannot be filled in: 'hint'"),
        (["data.source=nowhere.jsonl"], "data.source: there is no file"),
        (["train.problems_per_step=100"], "data.source has 16 training rows"),
        (["rollout.max_new_tokens=4000"], "16 of 16 rows are too long"),
        (["prompts.student_chat={enable_thinking: 1}", "model.path=/nowhere"], "model.path is"),
        (["train.steps=0"], "train.steps is 0"),
    ],
)
def test_a_dry_run_finds_what_training_would_refuse(overrides, wanted, files, tmp_path, capsys):
    own = small("opcd", files, tmp_path / "run")
    arguments = ["train", str(EXAMPLES / "opcd.yaml"), *own, "prompts.too_long=error"]
    assert main([*arguments, *overrides, "--dry-run"]) == 1
    assert wanted in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
