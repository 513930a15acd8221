"""A table of completions reaches each logger by the call that its library has for one."""

import os
from types import SimpleNamespace

import pytest

from opsd.config.sections import OutputSection
from opsd.training.reporters import COLUMNS, Reports, log_table

ROWS = [(3, "1|1", "2", "it\nis 2", True), (3, "2+2", "4", "5", False)]


class Calls:
    """An object whose every method notes how it was called, and returns that."""

    def __init__(self):
        self.made = []

    def __getattr__(self, name):
        def call(*given, **more):
            self.made.append((name, given, more))
            return name, given, more

        return call


def test_wandb_gets_a_table_at_its_step():
    calls = Calls()
    log_table(SimpleNamespace(_wandb=calls), ROWS, 3, "completions")
    (_, _, table), (_, (logged,), _) = calls.made
    assert table == {"columns": list(COLUMNS), "data": [list(row) for row in ROWS]}
    assert logged["train/global_step"] == 3 and logged["completions"][0] == "Table"


def test_mlflow_and_comet_get_rows():
    calls = Calls()
    log_table(SimpleNamespace(_ml_flow=calls), ROWS, 3, "completions")
    (name, (columns,), more), *_ = calls.made
    assert name == "log_table" and more == {"artifact_file": "completions-3.json"}
    assert columns["completion"] == ["it\nis 2", "5"]
    calls = Calls()
    log_table(SimpleNamespace(_experiment=calls), ROWS, 3, "completions")
    assert calls.made == [("log_table", ("completions-3.csv", ROWS), {"headers": list(COLUMNS)})]


def test_tensorboard_gets_markdown_whose_cells_hold():
    calls = Calls()
    log_table(SimpleNamespace(tb_writer=calls), ROWS, 3, "completions")
    (_, (name, text, step), _) = calls.made[0]
    assert (name, step) == ("completions", 3)
    assert "| 3 | 1\\|1 | 2 | it<br>is 2 | True |" in text.splitlines()


@pytest.mark.parametrize("given", ["comet", ["comet_ml"], ["comet"]])
def test_one_name_will_do(given):
    assert OutputSection(report_to=given).report_to == ["comet_ml"]


def test_none_is_none():
    assert OutputSection(report_to="none").report_to == []


def test_project_and_tags_are_told_and_the_environment_wins(monkeypatch):
    for name in ("WANDB_TAGS", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_TAGS", "COMET_PROJECT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setattr(
        "opsd.training.reporters.get_reporting_integration_callbacks", lambda names: [Calls]
    )
    Reports(OutputSection(report_to="wandb", project="sums", tags=["a", "b"]))
    assert os.environ["WANDB_PROJECT"] == "mine" and os.environ["WANDB_TAGS"] == "a,b"
    assert os.environ["MLFLOW_EXPERIMENT_NAME"] == "sums"
    assert os.environ["MLFLOW_TAGS"] == '{"a": "true", "b": "true"}'


def test_each_role_has_its_own_table(monkeypatch):
    """A teacher's completions do not stand for the student's of the same step."""
    names = []
    monkeypatch.setattr("opsd.training.reporters.log_table", lambda *given: names.append(given[2:]))
    reports = Reports(OutputSection())
    reports.loggers = [Calls()]
    for role in ("student", "teacher"):
        reports.evaluation({"role": role, "step": 0, "accuracy": 0.5}, ROWS)
    reports.on_train_begin(None, SimpleNamespace(is_world_process_zero=True), None)
    assert names == [(0, "completions"), (0, "teacher_completions")]
