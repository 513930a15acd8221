"""The examples fit the machines that they are for; the migration pages name fields that exist."""

import json
import re
from pathlib import Path

import pytest
import yaml
from helpers.machines import FITS
from helpers.training_cases import write_model

from opsd.cli.main import main
from opsd.config.config import Config
from opsd.config.load import describe, load_config
from opsd.config.sections import LoraSection
from opsd.quickstart.worksheet import worksheet_rows

ROOT = Path(__file__).resolve().parents[2]


EXAMPLES = [ROOT / "examples" / f"{name}.yaml" for name in FITS]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_fits_the_machine_that_it_is_for(path, capsys):
    config = load_config(path)
    assert config.output.dir == f"runs/{path.stem}"
    arguments = FITS[path.stem]
    overrides = [word for word in arguments if "=" in word]
    assert main(["plan", str(path), *overrides, *arguments[len(overrides) :], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A tiny model, and rows in the schemas of the data sets that the examples name."""
    directory = tmp_path_factory.mktemp("stand-ins")
    model = write_model(directory / "model")
    for name, seed, count in (("train", 3, 40), ("held-out", 4, 8)):
        rows = [dict(row.columns) for row in worksheet_rows(count, seed=seed)]
        for row in rows:
            row |= {"Answer": row["answer"], "question": row["problem"]}
            row |= {"deepseek_solution": row["solution"], "ground_truth_solution": row["answer"]}
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text)
    return model, directory / "train.jsonl", directory / "held-out.jsonl"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_examples_dry_run(path, stand_ins, monkeypatch, capsys):
    """What it names on the hub, and a GPU, are stood in for; the rest is checked as it is."""
    model, rows, held_out = stand_ins
    config = load_config(path)
    overrides = [f"model.path={model}", f"data.source={rows}", "data.size=null"]
    overrides += ["data.options={}", "rollout.engine=generate", "rollout.max_new_tokens=20"]
    if config.teacher.policy == "model":
        overrides.append(f"teacher.path={model}")
    if config.eval.problems:
        overrides += [f"eval.source={held_out}", "eval.options={}"]
    if config.train.sharding == "fsdp2":
        monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", str(path), *overrides, "--dry-run"]) == 0, capsys.readouterr().err
    assert "Nothing was trained" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["from-trl.md", "from-official.md", "vllm.md"])
def test_pages_name_fields_that_exist(page):
    known = {f"{section}.{name}" for section, name, *_ in describe()}
    sections = "|".join(name for name in Config.model_fields if name != "method")
    named = set(re.findall(rf"`((?:{sections})\.[a-z_0-9.]+)", (ROOT / "docs" / page).read_text()))
    assert len(named) >= 5
    assert {name.rstrip(".") for name in named} <= known


def test_lora_keys_that_pages_name():
    for page in ("from-trl.md", "from-official.md"):
        text = (ROOT / "docs" / page).read_text()
        for keys in re.findall(r"`model\.lora: \{(.*?)\}`", text):
            names = set(yaml.safe_load(f"{{{keys}}}"))
            assert names <= set(LoraSection.model_fields), keys
