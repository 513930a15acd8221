"""A model that has code, the mark that running it leaves, and `opsd train` on overrides."""

import json

import pytest
import yaml
from helpers.strangers import AUTO, CODE, copied
from helpers.training_cases import short_values

from opsd.cli.main import main
from opsd.config.load import merge


@pytest.fixture
def train(files, tmp_path, monkeypatch):
    """Runs `opsd train` on overrides; returns its exit code."""
    monkeypatch.setattr("opsd.training.run.write_report", lambda directory: None)
    values = short_values(*files, tmp_path / "run")
    short = {"train": {"steps": 2, "save_every": 1}, "eval": {"problems": 0}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(merge(values, short)))
    return lambda *words: main(["train", str(tmp_path / "c.yaml"), *map(str, words)])


@pytest.fixture
def marker(tmp_path):
    """The directory that a payload makes where it runs."""
    return tmp_path / "the payload has run"


@pytest.fixture
def with_code(files, marker, tmp_path):
    """A model directory whose config.json asks for Python code that is beside it."""
    model = copied(files, tmp_path / "evil")
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((model / name).read_text())
        values |= {"auto_map": AUTO}
        if name == "config.json":
            values["model_type"] = "evil"
        (model / name).write_text(json.dumps(values))
    (model / "evil.py").write_text(CODE.format(marker=str(marker)))
    return model
