"""The step's benchmark: all ways agree, wrong ones are refused, and the report is whole."""

import json

import pytest
import torch

from benchmarks import step, step_ways
from benchmarks.measure import Disagreement
from benchmarks.step import Case, measure, tiny
from benchmarks.step_ways import Setting
from opsd.models.copies import copy_model

CASE = Case(2, 3, 11, 23, 9)


@pytest.fixture(scope="module")
def setting():
    model = tiny()
    return Setting(model, copy_model(model, torch.float32), False, 4096)


def test_all_ways_have_the_same_gradient(setting):
    row = measure(CASE, setting, rounds=1, seconds=0)
    assert set(row["seconds"]) >= {"shared", "naive", "grouper"} and not row["failed"]
    assert max(row["errors"].values()) < 1e-4
    assert row["token_ratio"] > 1.5 and row["tokens"] == 2 * (9 + 9 + 8)


def test_the_ratio_of_products_counts_the_students_thrice():
    groups = Case(1, 2, 10, 100, 5).groups(9)  # rollouts of 5 and 5 tokens
    assert [s.tokens for s in groups[0].samples] == [5, 5]
    alone = 2 * (3 * (10 + 4) + (100 + 4))
    shared = 3 * (10 + 8) + (100 + 8)
    assert step.work_ratio(groups) == alone / shared


def test_a_way_with_another_gradient_is_refused(setting, monkeypatch):
    right = step_ways.grouper_attention
    monkeypatch.setattr(step_ways, "grouper_attention", lambda *a, **more: 1.01 * right(*a, **more))
    with pytest.raises(Disagreement, match="grouper"):
        measure(CASE, setting, rounds=1, seconds=0)


def test_the_report(tmp_path, monkeypatch, capsys):
    output = tmp_path / "step.json"
    arguments = ["step", "--case", str(CASE), "--rounds", "1", "--output", str(output)]
    monkeypatch.setattr("sys.argv", arguments)
    assert step.main() == 0
    report = json.loads(output.read_text())
    parts = {k.removesuffix("_seconds") for k in report["step"]["parts"] if k.endswith("_seconds")}
    assert parts == {"rollout", "teacher", "student", "loss", "backward", "optimizer"}
    assert report["rows"][0]["case"]["teacher"] == 23 and report["machine"]["cores"]
    assert 0 < report["step"]["operators"][0]["share"] < 1
    out = capsys.readouterr().out
    assert "times fewer tokens" in out and "optimizer" in out


def test_the_gpu_case_says_that_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["step", "--gpu"])
    assert step.main() == 2 and "no GPU" in capsys.readouterr().err
