"""output.keep and train.early_stop: the model of the best held-out evaluation is not lost."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.lines import read_lines
from helpers.training_cases import short_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opsd.cli.main import main
from opsd.config.load import save_config
from opsd.training.held_out import HeldOut
from opsd.training.run import Run

ACCURACIES = [0.25, 0.5, 1.0, 0.5, 1.0, 0.75]  # of steps 0 to 5; the first of the best is step 2's


@pytest.fixture
def train(files, tmp_path, monkeypatch, capsys):
    """Trains five steps, each evaluated as ACCURACIES has it, and saved as a checkpoint."""
    evaluate = HeldOut.evaluate

    def as_told(self, *arguments, **more):
        result = evaluate(self, *arguments, **more)
        done = len(read_lines(tmp_path / "run" / "metrics.jsonl"))
        count = ACCURACIES[done] * len(result.grades)
        grades = [replace(grade, correct=i < count) for i, grade in enumerate(result.grades)]
        return replace(result, grades=grades)

    monkeypatch.setattr(HeldOut, "evaluate", as_told)

    def run(*overrides, code=0):
        place, file = tmp_path / "run", tmp_path / "run.yaml"
        how = {"steps": 5, "save_every": 1, "save_total_limit": 9}
        config = short_config(*files, place, train=how, eval={"every": 1, "samples": 0})
        save_config(config, file)
        assert main(["train", str(file), *overrides]) == code
        return place, capsys.readouterr().out

    return run


def weights(place: Path) -> dict:
    return load_file(place / "model.safetensors")


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize(
    ("keep", "models"),
    [("last", {"model": 5}), ("best", {"model": 2}), ("both", {"model": 5, "best/model": 2})],
)
def test_the_model_of_the_best_evaluation_stays(keep, models, train):
    place, said = train(f"output.keep={keep}")
    for name, step in models.items():
        assert equal(weights(place / name), weights(place / f"checkpoint-{step}")), name
        AutoModelForCausalLM.from_pretrained(place / name)
    assert (place / "best").exists() == (keep == "both")
    summary = json.loads((place / "summary.json").read_text())
    assert summary["best"] == {"step": 2, "accuracy": 1.0}
    assert summary["accuracy"] == {"before": 0.25, "after": 0.75}
    assert ("of step 2, 1.000" in said) == (keep != "last")
    assert "best after step 2: 100" in (place / "report.html").read_text()


def test_a_run_that_only_falls_keeps_its_start(files, train, monkeypatch):
    monkeypatch.setitem(globals(), "ACCURACIES", [0.75, 0.5, 0.75, 0.25, 0.5, 0.0])
    place, said = train("output.keep=best")
    base = AutoModelForCausalLM.from_pretrained(files[0]).state_dict()
    kept = AutoModelForCausalLM.from_pretrained(place / "model").state_dict()
    assert equal(kept, base) and not equal(
        weights(place / "model"), weights(place / "checkpoint-5")
    )
    summary = json.loads((place / "summary.json").read_text())
    assert summary["best"] == {"step": 0, "accuracy": 0.75} and "of step 0, 0.750" in said


def test_early_stop_ends_after_evaluations_that_are_no_better(train):
    place, said = train("train.early_stop=2", "output.keep=best")
    assert "Early stop: 2 evaluations were no better than step 2's" in said
    assert len(read_lines(place / "metrics.jsonl")) == 4
    assert equal(weights(place / "model"), weights(place / "checkpoint-2"))


def test_a_run_interrupted_while_it_keeps_the_best_measures_it_again(train, monkeypatch):
    save = Run._save

    def interrupted(self, place):
        if len(read_lines(self.directory / "metrics.jsonl")) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        save(self, place)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_save", interrupted)
        train("output.keep=best", "train.save_every=0", code=143)
    place, _ = train("output.keep=best", "--resume")
    lines = read_lines(place / "evaluations.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert equal(weights(place / "model"), weights(place / "checkpoint-2"))


def test_it_needs_evaluations(train, capsys):
    train("output.keep=best", "eval.every=0", code=1)
