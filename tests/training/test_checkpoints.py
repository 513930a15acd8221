"""Checkpoints are whole or absent; a resumed run is the undisturbed run; schedules are obeyed."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.lines import read_lines
from helpers.training_cases import ROWS, quiet, short_config, timeless, write_model
from safetensors.torch import load_file

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.common.random_states import random_states
from opsd.config.load import save_config
from opsd.models.load import load_model
from opsd.quickstart.worksheet import WorksheetGrader
from opsd.runs.directory import claim_directory
from opsd.training.checkpoints import Checkpoints
from opsd.training.run import run


def execute(config, **more):
    model, tokenizer = load_model(config.model)
    torch.manual_seed(config.train.seed)
    rows, held_out = ROWS[:12], ROWS[12:]
    return run(config, model, tokenizer, rows, held_out, WorksheetGrader(), quiet(), **more)


def claimed(config):
    claim_directory(Path(config.output.dir), config, False)
    return config


MIX = [
    {"coefficient": [1.5, 0.25], "steps": 4},
    {"coefficient": 0.5, "context": "student", "policy": "ema"},
    {"coefficient": 0.25, "context": "student", "policy": "live"},
]


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"precision": "bf16"}},
        {"teacher": {"ema_decay": 0.5, "mix": MIX}},
        {
            "method": "grpo",
            "rollout": {"group_size": 2},
            "loss": {"distil": 0.5},
            "teacher": {"ema_decay": 0.5, "mix": MIX},
        },
    ],
    ids=["bf16", "a mixture", "a mixture beside grpo"],
)
def test_resuming_changes_nothing(sections, files, tmp_path):
    whole = claimed(short_config(*files, tmp_path / "whole", **sections))
    execute(whole)
    again = claimed(short_config(*files, tmp_path / "again", **sections))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl"):
        lines = (tmp_path / "whole" / name).read_text().splitlines(keepends=True)
        (tmp_path / "again" / name).write_text("".join(lines))
    execute(again, checkpoint=tmp_path / "again" / "checkpoint-2")
    lines = [timeless(read_lines(tmp_path / name / "metrics.jsonl")) for name in ("whole", "again")]
    assert len(lines[0]) == 4
    assert lines[0] == lines[1]
    weights = [
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "again")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        ("constant", lambda done: 1.0),
        ("linear", lambda done: 1 - done),
        ("cosine", lambda done: (1 + math.cos(math.pi * done)) / 2),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule, shape, files, tmp_path):
    steps, warmup, rate = 6, 2, 1e-3
    train = {"steps": steps, "warmup_steps": warmup, "schedule": schedule, "save_every": 0}
    config = short_config(*files, tmp_path / "run", method="sft", train=train, eval={"every": 0})
    execute(claimed(config))
    logged = [line["learning_rate"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    # The rate logged with step n is the one that step was taken with: n - 1 steps were done.
    wanted = [
        rate * (n / warmup if n < warmup else shape((n - warmup) / (steps - warmup)))
        for n in range(steps)
    ]
    assert logged == pytest.approx(wanted)


def test_a_full_disk_leaves_whole_checkpoints_only(files, tmp_path, monkeypatch, capsys):
    """The second checkpoint does not fit, as torch.save reports it: one line, the first is kept."""
    config = short_config(*files, tmp_path / "run")
    path = tmp_path / "config.yaml"
    save_config(config, path)
    write_files = Checkpoints._write_files

    def full(self, place, state):
        write_files(self, place, state)
        if state.global_step == 4:
            free = shutil.disk_usage(tmp_path)._replace(free=1000)
            monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")

    monkeypatch.setattr(Checkpoints, "_write_files", full)
    assert main(["train", str(path)]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "output.dir" in message and "the disk is full, checkpoint-4" in message
    found = sorted(p.name for p in (tmp_path / "run").iterdir() if p.is_dir())
    assert found == ["checkpoint-2"]
    monkeypatch.undo()
    assert main(["train", str(path), "--resume"]) == 0
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_another_error_of_a_checkpoint_is_not_a_full_disk(files, tmp_path, monkeypatch):
    def broken(self, place, state):
        raise RuntimeError("something else")

    monkeypatch.setattr(Checkpoints, "_write_files", broken)
    with pytest.raises(RuntimeError, match="something else"):
        execute(claimed(short_config(*files, tmp_path / "run")))
    assert not list((tmp_path / "run").glob("*.part"))


def test_only_the_newest_checkpoints_are_kept(files, tmp_path):
    train = {"steps": 4, "save_every": 1, "save_total_limit": 2}
    execute(claimed(short_config(*files, tmp_path / "run", train=train)))
    found = {p.name for p in (tmp_path / "run").iterdir() if p.is_dir()}
    assert found == {"checkpoint-3", "checkpoint-4", "model"}


def test_a_run_goes_on_with_the_teacher_that_it_had(files, tmp_path):
    for name, seed in (("teacher", 3), ("other", 4)):
        write_model(tmp_path / name, seed)
    own = {"method": "distill", "teacher": {"policy": "model", "path": str(tmp_path / "teacher")}}
    config = claimed(short_config(*files, tmp_path / "run", **own))
    execute(config)
    (tmp_path / "teacher").rename(tmp_path / "kept")
    (tmp_path / "other").rename(tmp_path / "teacher")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    with pytest.raises(UserError, match=r"began with other weights than those in teacher\.path"):
        execute(config, checkpoint=checkpoint)
    shutil.rmtree(tmp_path / "teacher")
    (tmp_path / "kept").rename(tmp_path / "teacher")
    execute(config, checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("written", "count", "expected"),
    [
        (1, 1, [0]),
        (2, 2, [0, 1]),
        (2, 1, [0]),
        (3, 2, [0, 1]),
        (1, 2, [0, None]),
        (2, 3, [0, 1, None]),
    ],
)
def test_more_or_fewer_processes_read_random_states(written, count, expected, tmp_path):
    def checkpoints(index, count):
        made = object.__new__(Checkpoints)
        made.processes = SimpleNamespace(index=index, count=count, first=index == 0)
        return made

    drawn = []
    for index in range(written):
        torch.manual_seed(index)
        torch.save(random_states(), tmp_path / checkpoints(index, written)._random_file)
        drawn.append(torch.rand(()))
    for index, whose in enumerate(expected):
        torch.manual_seed(100 + index)
        own = torch.rand(())
        torch.manual_seed(100 + index)
        checkpoints(index, count).read_random_states(tmp_path)
        assert torch.rand(()) == (own if whose is None else drawn[whose])
