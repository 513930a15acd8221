"""How many files of ours a reader opens to follow one OPSD step to the kernel."""

import sys
from pathlib import Path

import pytest
from helpers.training_cases import quiet, short_config

import opsd
from opsd.training.run import train
from opsd.training.trainer import TrainingLoop
from opsd_kernels import linear_divergence

MOST_FILES = 12
NOT_COUNTED = ("common/", "distributed/")
"""Clocks, casts, and what several processes do: one process passes through."""


@pytest.mark.parametrize("policy", ["initial", "live"])
def test_a_step_crosses_few_files(policy, files, tmp_path, monkeypatch):
    """From the trainer's updates, which are given the step's groups, to the kernel's call."""
    package, crossed = Path(opsd.__file__).parent, []

    def profile(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(package):
            crossed.append(path.relative_to(package).as_posix())

    updates = TrainingLoop._updates

    def traced(self, batches):
        if self.state.global_step == 1:  # not the first, which also checks and chooses
            sys.setprofile(profile)
        return updates(self, batches)

    def called(*arguments, **more):
        sys.setprofile(None)
        return linear_divergence(*arguments, **more)

    monkeypatch.setattr(TrainingLoop, "_updates", traced)
    monkeypatch.setattr("opsd.objectives.opsd.linear_divergence", called)
    sections = {"rollout": {"group_size": 2}, "eval": {"problems": 0}, "train": {"steps": 2}}
    try:
        train(
            short_config(*files, tmp_path / "run", teacher={"policy": policy}, **sections), quiet()
        )
    finally:
        sys.setprofile(None)
    found = sorted({path for path in crossed if not path.startswith(NOT_COUNTED)})
    assert {"training/trainer.py", "training/step.py", "objectives/opsd.py"} <= {*found}
    assert len(found) <= MOST_FILES, found
