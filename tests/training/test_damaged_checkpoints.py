"""A checkpoint that is not as it was written is refused by file, and the one before is offered."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.saved import sealed
from helpers.training_cases import ROWS, quiet, short_config
from safetensors.torch import load_file, save_file

from opsd.common.errors import UserError
from opsd.common.saved_directory import MANIFEST, new_directory
from opsd.config.sections import LoraSection
from opsd.models.load import load_model
from opsd.quickstart.worksheet import WorksheetGrader
from opsd.runs.directory import claim_directory, last_checkpoint
from opsd.training.checkpoints import load_weights
from opsd.training.run import run

FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


def started(files, directory):
    config = short_config(
        *files,
        directory,
        train={"steps": 2, "save_every": 1},
        teacher={"policy": "ema"},
        eval={"problems": 0},
    )
    return config, claim_directory(directory, config, True)


def go_on(config, checkpoint, model=None):
    loaded, tokenizer = load_model(config.model)
    model = model or loaded
    torch.manual_seed(config.train.seed)
    run(
        config,
        model,
        tokenizer,
        ROWS[:12],
        [],
        WorksheetGrader(),
        quiet(),
        checkpoint=checkpoint,
        save=False,
    )


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """A run with the checkpoints 1 and 2."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    go_on(*started(files, directory))
    assert last_checkpoint(directory).name == "checkpoint-2"
    return directory


@pytest.fixture
def damaged(finished, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(finished, tmp_path / "run")


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "another bit": flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-2]),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", [*FILES, "teacher.safetensors", "tokenizer.json", MANIFEST])
def test_each_damage_to_each_file_is_noticed(name, kind, damaged):
    file = damaged / "checkpoint-2" / name
    DAMAGE[kind](file)
    with pytest.raises(UserError) as caught:
        last_checkpoint(damaged)
    said = str(caught.value)
    assert "checkpoint-2" in said and "goes on from checkpoint-1" in said
    assert f"`rm -r {damaged}/checkpoint-2 && opsd train {damaged} --resume`" in said
    if name != MANIFEST:
        assert repr(str(file)) in said
    shutil.rmtree(damaged / "checkpoint-2")
    assert last_checkpoint(damaged).name == "checkpoint-1"


def test_the_last_whole_one_is_offered_or_none(damaged):
    shutil.copytree(damaged / "checkpoint-2", damaged / "checkpoint-3")
    flip(damaged / "checkpoint-2" / "optimizer.pt")
    with pytest.raises(UserError, match=r"checkpoint-3' .*is of step 2") as caught:
        last_checkpoint(damaged)
    both = f"rm -r {damaged}/checkpoint-2 {damaged}/checkpoint-3 && "
    assert both in str(caught.value) and "from checkpoint-1" in str(caught.value)
    flip(damaged / "checkpoint-1" / "optimizer.pt")
    with pytest.raises(UserError, match="no whole checkpoint before"):
        last_checkpoint(damaged)


def test_other_names_are_left_alone(files, damaged):
    names = ["checkpoint-best", "checkpoint-2.bak", "checkpoint-", "checkpoint-٣", "checkpoint-1e3",
             "checkpoint--4", "checkpoint-" + "9" * 5000][:6]  # fmt: skip
    for name in names:
        shutil.copytree(damaged / "checkpoint-1", damaged / name)
    (damaged / "checkpoint-9").touch()
    assert last_checkpoint(damaged).name == "checkpoint-2"
    shutil.rmtree(damaged / "checkpoint-2")
    config, checkpoint = started(files, damaged)
    config = config.model_copy(
        update={"train": config.train.model_copy(update={"save_total_limit": 1})}
    )
    assert checkpoint.name == "checkpoint-1"
    go_on(config, checkpoint)
    there = {path.name for path in damaged.glob("checkpoint*")}
    assert there == {*names, "checkpoint-9", "checkpoint-2"}


def without_a_tensor(file):
    weights = load_file(file)
    weights.pop(sorted(weights)[3])
    save_file(weights, file, {"format": "pt"})


def test_what_agrees_with_its_manifest_but_not_with_the_run_is_refused(files, damaged):
    """Of another model, or with a tensor missing; a stranger's file beside ours is not read."""
    checkpoint = damaged / "checkpoint-2"
    save_file({"x": torch.zeros(1)}, checkpoint / "a_model.safetensors")
    go_on(*started(files, damaged))
    (checkpoint / "a_model.safetensors").unlink()
    without_a_tensor(checkpoint / "model.safetensors")
    sealed(checkpoint)
    with pytest.raises(UserError, match=r"checkpoint-2' cannot be read .*lacks"):
        go_on(*started(files, damaged))
    shutil.rmtree(checkpoint)
    config, place = started(files, damaged)
    model, _ = load_model(config.model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01)
    with pytest.raises(UserError, match=r"began with other weights than those in model\.path"):
        go_on(config, place, model)


def test_a_strangers_weights_beside_ours_are_not_loaded(files, finished, tmp_path):
    place = shutil.copytree(finished / "checkpoint-2", tmp_path / "checkpoint-2")
    ours = load_file(place / "model.safetensors")
    for name in ("a_model.safetensors", "zz_model.safetensors"):
        save_file({key: torch.zeros_like(weight) for key, weight in ours.items()}, place / name)
    model, _ = load_model(started(files, tmp_path / "run")[0].model)
    load_weights(model, place, json.loads((place / MANIFEST).read_text())["files"])
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, ours.get(key, weight)), key


def test_a_damaged_model_is_refused_before_it_is_read(files, tmp_path):
    with new_directory(tmp_path / "model") as place:
        shutil.copytree(files[0], place, dirs_exist_ok=True)
    section = short_config(*files, tmp_path / "run").model
    section = section.model_copy(update={"path": str(tmp_path / "model")})
    load_model(section)
    flip(tmp_path / "model" / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors' is not what was saved"):
        load_model(section)


def test_a_manifest_that_was_changed_is_refused(damaged):
    file = damaged / "checkpoint-2" / MANIFEST
    file.write_text(file.read_text().replace('"bytes": ', '"bytes":  1', 1))
    with pytest.raises(UserError, match=r"manifest.json' is damaged"):
        last_checkpoint(damaged)


@pytest.mark.parametrize(
    "more", [{"best_global_step": 2, "stateful_callbacks": {"A": {}}}, {"is_hyper": True, "x": [1]}]
)
def test_a_state_of_another_transformers_goes_on(more, damaged):
    """Its releases have added keys to trainer_state.json, and will again."""
    file = damaged / "checkpoint-2" / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    sealed(file.parent)
    assert last_checkpoint(damaged).name == "checkpoint-2"


def test_all_files_of_an_adapters_checkpoint_are_in_its_manifest(files, tmp_path):
    """peft writes a README.md, which no manifest lists: its damage would go unnoticed."""
    config = short_config(*files, tmp_path, train={"steps": 1, "save_every": 1})
    lora = config.model.model_copy(update={"lora": LoraSection(rank=2)})
    config = config.model_copy(update={"model": lora})
    go_on(config, None)
    place = tmp_path / "checkpoint-1"
    listed = json.loads((place / MANIFEST).read_text())["files"]
    assert {path.name for path in place.iterdir()} == {*listed, MANIFEST}
    assert "adapter_model.safetensors" in listed
