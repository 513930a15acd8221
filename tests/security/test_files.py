"""Files of strangers: what they hold is read, never run, and decides nothing."""

import json
import os
import pickle
import shutil

import pytest
import torch
import yaml
from helpers.payload import Payload
from helpers.saved import sealed
from helpers.strangers import copied, refused
from safetensors.torch import load_file, save_file

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.config.load import merge
from opsd.runs.directory import _mark, locked
from opsd.runs.log import RunLog
from opsd.runs.records import Line, checked_lines


def test_the_payload_would_run(marker):
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


def test_pickled_weights_are_not_read(files, train, marker, tmp_path, capsys):
    model = copied(files, tmp_path / "model")
    torch.save(Payload(marker), model / "pytorch_model.bin")
    assert main(["eval", str(model), "--benchmark", str(files[1]), "--problems", "1",
                 "--max-new-tokens", "2", "--output", str(tmp_path / "e")]) == 0  # fmt: skip
    capsys.readouterr()
    (model / "model.safetensors").unlink()
    for words in ([f"model.path={model}"], ["teacher.policy=model", f"teacher.path={model}"]):
        assert train(*words, f"output.dir={tmp_path / f'of-{words[0][:5]}'}") == 1
        refused(capsys, "its weights are a pickle (pytorch_model.bin)", "safetensors")
    assert not marker.exists()


def test_pickles_beside_other_safetensors_are_not_read(files, train, marker, tmp_path, capsys):
    model = copied(files, tmp_path / "model")
    (model / "model.safetensors").rename(model / "more.safetensors")
    torch.save(load_file(model / "more.safetensors"), model / "pytorch_model.bin")
    assert train(f"model.path={model}") == 1
    refused(capsys, "model.path is", "safetensors")


def test_a_pickled_adapter_is_not_read(files, train, marker, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": str(files[0]), "peft_type": "LORA", "r": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    torch.save(Payload(marker), adapter / "adapter_model.bin")
    assert train(f"model.path={adapter}") == 1
    refused(capsys, "adapter", "safetensors")
    assert not marker.exists()


PICKLES = ["optimizer.pt", "scheduler.pt", "rng_state.pth"]


def test_a_checkpoint_to_resume_from_runs_nothing(train, marker, tmp_path, capsys):
    """Also where its manifest is made to agree."""
    assert train() == 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    capsys.readouterr()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    for name in PICKLES:
        good = (checkpoint / name).read_bytes()
        torch.save(Payload(marker), checkpoint / name)
        assert train("--resume") == 1
        refused(capsys, f"checkpoint-1/{name}' is not what was saved", "no whole checkpoint before")
        sealed(checkpoint)
        assert train("--resume") == 1
        refused(capsys, "checkpoint-1' cannot be read", "Weights only load failed")
        (checkpoint / name).write_bytes(good)
        sealed(checkpoint)
    assert train("--resume") == 0
    assert not marker.exists()


def test_nothing_is_written_through_links(train, tmp_path, capsys):
    """Of a run directory that came from elsewhere, with links to files of the user."""
    assert train() == 0
    run, own = tmp_path / "run", tmp_path / "the user's own"
    own.mkdir()
    capsys.readouterr()
    lock = run / "run.lock"
    lock.unlink()
    lock.symlink_to(own / "lock")
    assert train("--resume") == 1
    refused(capsys, "run.lock' is a link")
    lock.unlink()
    shutil.rmtree(run / "checkpoint-2")
    names = ("metrics.jsonl", "rollouts.jsonl", "config.yaml", "problems.json", "model")
    for name in names:
        shutil.move(run / name, own / name)
        (run / name).symlink_to(own / name)
    pages = {"report.html": b"old", "curves.png": None}
    for name, content in pages.items():
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(own / name)
        if content is not None:
            (own / name).write_bytes(content)
    before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}
    for name in ("metrics.jsonl", "problems.json", "rollouts.jsonl"):  # as they are read
        assert train("--resume") == 1
        refused(capsys, f"{name}' is a link, which is not followed")
        (run / name).unlink()
        shutil.copy(own / name, run / name)
    assert train("--resume") == 0
    assert main(["report", str(run)]) == 0
    assert {path: path.read_bytes() for path in own.rglob("*") if path.is_file()} == before
    assert [name for name in (*names, *pages) if (run / name).is_symlink()] == []
    with pytest.raises(UserError, match=r"samples\.jsonl' is a link"):
        (run / "samples.jsonl").symlink_to(own / "not there yet")
        RunLog(run, 2).sample({"step": 2})


def test_a_failed_steps_file_runs_nothing(marker, tmp_path, capsys):
    torch.save({"config": Payload(marker)}, tmp_path / "failed-step-1.pt")
    assert main(["replay", str(tmp_path / "failed-step-1.pt")]) == 1
    refused(capsys, "not a failed step's", "Weights only load failed")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload(marker)))
    assert main(["replay", str(tmp_path / "plain.pt")]) == 1
    refused(capsys, "not a failed step's")
    assert not marker.exists()


@pytest.mark.parametrize("text", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64])
def test_a_gguf_file_of_nonsense_is_one_line(text, files, train, tmp_path, capsys):
    (tmp_path / "x.gguf").write_bytes(text)
    assert train(f"model.path={tmp_path}", "model.gguf_file=x.gguf") == 1
    refused(capsys, "model.path is")


def test_an_evaluation_of_nan_weights_is_one_line(files, tmp_path, capsys):
    model = copied(files, tmp_path / "model")
    held = load_file(model / "model.safetensors")
    place = held["model.layers.0.mlp.up_proj.weight"]
    for number in (float("nan"), float("inf"), -1e30):
        place[1, 2] = number
        save_file(held, model / "model.safetensors", {"format": "pt"})
        words = ["--benchmark", str(files[1]), "--problems", "1", "--max-new-tokens", "2"]
        assert main(["eval", str(model), *words, "--output", str(tmp_path / f"{number}")]) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert "up_proj.weight" in said and "NaN, infinite or too large" in said
    assert not list(tmp_path.glob("*/result.json"))


def test_a_directory_decides_nothing_but_its_date(train, files, tmp_path, capsys):
    """A run's own config and an evaluation's identity are compared with what the user asks for."""
    assert train() == 0
    config = tmp_path / "run" / "config.yaml"
    good = yaml.safe_load(config.read_text())
    for section, values in (
        ("model", {"trust_remote_code": True}),
        ("rollout", {"temperature": 0.5}),
        ("prompts", {"date": "{{ 9**9 }}"}),
    ):
        config.write_text(yaml.safe_dump(merge(good, {section: values})))
        capsys.readouterr()
        assert train("--resume") == 1
        refused(capsys, *(f"{section}.{name}" for name in values))
    config.write_text(yaml.safe_dump(good))
    assert train("--resume", "train.precision=bf16") == 1  # asked for, so that it is not the file's
    refused(capsys, "train.precision is 'fp32' there, 'bf16' here")
    asked = ["eval", str(files[0]), "--benchmark", str(files[1]), "--problems", "1"]
    asked += ["--max-new-tokens", "2", "--output", str(tmp_path / "e")]
    assert main(asked) == 0
    identity = tmp_path / "e" / "evaluation.json"
    saved = json.loads(identity.read_text())
    for damage in ({"date": "tomorrow"}, {"date": 3}, {"identity": 7}, {"identity": {}}):
        identity.write_text(json.dumps(saved | damage))
        capsys.readouterr()
        assert main(asked) == 1
        refused(capsys, "--output")


def test_a_large_config_is_not_parsed(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("model: {path: m}\n" + "#" * (1 << 20))
    assert main(["train", str(tmp_path / "c.yaml")]) == 1
    refused(capsys, "at most 1,048,576 are read")


def test_what_a_lock_says_is_not_obeyed(tmp_path):
    """Whoever says that he trains there and does not hold the lock is not waited for."""
    (tmp_path / "config.yaml").touch()
    (tmp_path / "run.lock").write_text(f"{_mark(os.getppid())}\non a machine\n")
    with locked(tmp_path):
        assert (tmp_path / "run.lock").read_text().startswith(f"{os.getpid()} ")
    os.truncate(tmp_path / "run.lock", 10**12)  # a sparse file, of which only the start is read
    with locked(tmp_path):
        assert (tmp_path / "run.lock").read_text().startswith(f"{os.getpid()} ")


def test_messages_cannot_move_the_cursor(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text('model: {path: m}\n"da\\x1b[2Jta\\n\\u202e": {}')
    assert main(["train", str(tmp_path / "c.yaml")]) == 1
    refused(capsys, "unknown key")


def test_a_torn_log_is_one_line(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n\x00\x00\n{"step": 3}\n{"st')
    with pytest.raises(UserError, match=r"m\.jsonl' is damaged in line 2"):
        list(checked_lines(tmp_path / "m.jsonl", Line))
