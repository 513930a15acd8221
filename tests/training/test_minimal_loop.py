"""examples/minimal_loop.py is what `opsd train` does."""

import runpy
from pathlib import Path

import pytest
from helpers.lines import read_lines
from helpers.training_cases import quiet, short_config

from opsd.training.run import train

EXAMPLE = Path(__file__).parents[2] / "examples" / "minimal_loop.py"


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"steps": 6}},  # more than an epoch
        {
            "rollout": {"group_size": 2},
            "loss": {"divergence": "jsd", "beta": 0.3, "clip": "token", "clip_threshold": 0.3},
        },
    ],
    ids=["epochs", "groups"],
)
@pytest.mark.usefixtures("no_report")
def test_its_losses_are_those_of_opsd_train(sections, files, tmp_path, capsys):
    config = short_config(*files, tmp_path / "run", **sections)
    losses = runpy.run_path(str(EXAMPLE))["train"](config)
    train(config, quiet())
    wanted = [line["loss"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert losses == pytest.approx(wanted, rel=1e-4)
    assert len(losses) == config.train.steps and max(losses) > 0.1
