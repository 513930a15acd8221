"""Runs, failed steps and studies of strangers are looked at; they run nothing, ask nobody."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers.hostile_server import HostileServer, response
from helpers.strangers import CODE, copied, refused
from helpers.training_cases import short_config

from opsd.cli.main import main
from opsd.models.load import load_model
from opsd.objectives import Sample, SampleGroup
from opsd.training.failed_steps import failed_step, save_failed_step


def evil_run(run: Path, with_code: Path, files, marker: Path) -> Path:
    """A run whose config names a verifier and a gate, and whose model has code."""
    run.mkdir()
    verifier = run / "mine.py"
    verifier.write_text(CODE.format(marker=str(marker)))
    loss = {
        "reward": {"verifier": f"{verifier}:grade", "log": True},
        "gates": [{"gate": f"{verifier}:weigh"}],
    }
    model = {"path": str(with_code), "trust_remote_code": True}
    config = short_config(*files, run, model=model, loss=loss)
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump()))
    place = {"step": 1, "generated_tokens": 9, "trained_tokens": 9, "seconds": 1.0}
    shown = {"problem": "1+1", "solution": "2", "answer": "2", "completion": "2"}
    lines = {
        "metrics": [place],
        "samples": [place | shown],
        "evaluations": [place | {"step": s, "accuracy": 0.4 + s / 10} for s in (0, 1)],
    }
    for name, records in lines.items():
        (run / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return run


def test_a_run_to_look_at_runs_nothing(with_code, files, marker, tmp_path, monkeypatch):
    def ends(*_):
        raise EOFError

    monkeypatch.setattr("builtins.input", ends)
    run = evil_run(tmp_path / "run", with_code, files, marker)
    shutil.copytree(with_code, run / "model")
    assert main(["report", str(run)]) == 0
    assert main(["compare", str(run), "--output", str(tmp_path / "c"), "--target", "0.4"]) == 0
    shutil.rmtree(run / "model")
    copied(files, run / "model")
    asked = ["--benchmark", str(files[1]), "--problems", "1", "--max-new-tokens", "2"]
    assert main(["eval", str(run), *asked, "--output", str(tmp_path / "e")]) == 0
    assert main(["chat", str(run), "--max-new-tokens", "2"]) == 0
    assert not marker.exists()


def test_a_failed_steps_gates_and_verifier_do_not_run(files, marker, tmp_path, capsys):
    verifier = tmp_path / "mine.py"
    verifier.write_text(CODE.format(marker=str(marker)))
    loss = {
        "reward": {"verifier": f"{verifier}:grade", "log": True},
        "gates": [{"gate": f"{verifier}:weigh"}],
    }
    config = short_config(*files, tmp_path / "run", loss=loss)
    model, _ = load_model(config.model)
    samples = [Sample([4, 5, 6], 1.0)]
    groups = [SampleGroup([1, 2, 3], samples, ([1, 3, 2],))]
    file = save_failed_step(tmp_path, failed_step(config, 1, groups, model, None))
    assert main(["replay", str(file)]) == 0
    assert not marker.exists()


@pytest.mark.parametrize("of", ["model", "teacher"])
def test_a_failed_steps_file_cannot_ask_for_its_models_code(
    of, with_code, files, marker, tmp_path, capsys
):
    teacher = {"policy": "model", "path": str(with_code)} if of == "teacher" else {}
    model = {"path": str(with_code if of == "model" else files[0]), "trust_remote_code": True}
    verifier = tmp_path / "verifier.py"
    verifier.write_text(CODE.format(marker=str(marker)))
    loss = {"reward": {"verifier": f"{verifier}:grade", "log": True}}
    config = short_config(*files, tmp_path / "run", model=model, teacher=teacher, loss=loss)
    file = tmp_path / "failed-step-1.pt"
    groups = [{"student": [1], "teachers": [[1]], "samples": [{"rollout": [4], "weight": 1.0}]}]
    failed = {"step": 1, "groups": groups, "weights": {}, "average": None, "images": False}
    torch.save({"config": config.model_dump(), **failed}, file)
    assert main(["replay", str(file)]) == 1
    refused(capsys, f"{of}.trust_remote_code is false", "--trust-remote-code allows it")
    assert not marker.exists()
    with pytest.raises(SystemExit, match="7"):
        main(["replay", str(file), "--trust-remote-code"])
    assert marker.exists()


def test_a_dry_run_runs_no_verifier(train, marker, tmp_path, capsys):
    verifier = tmp_path / "mine.py"
    verifier.write_text(CODE.format(marker=str(marker)) + "def grade(text, row): return 1.0\n")
    words = ["--dry-run", "loss.reward.log=true"]
    gate = f"loss.gates=[{{gate: '{verifier}:grade'}}]"
    assert train(*words, f"loss.reward.verifier={verifier}:grade", gate) == 0
    assert train(*words, gate.replace("grade", "other")) == 1
    refused(capsys, "loss.gates is", "has no function 'other'")
    capsys.readouterr()
    assert train(*words, f"loss.reward.verifier={verifier}:other") == 1
    refused(capsys, "has no function 'other'")
    verifier.write_text("def grade(:")
    assert train(*words, f"loss.reward.verifier={verifier}:grade") == 1
    refused(capsys, "is not Python")
    assert not marker.exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"grpo": {"loss": {"reward": {"verifier": "{file}:grade"}}}},
        {"grpo.loss.reward.verifier": "{file}:grade"},
        {'grpo.loss.reward.verifier="{file}:grade" #': 1},
        {"opsd": {"loss": {"gates": [{"gate": "{file}:weigh"}]}}},
        {"opsd.loss.gates": [{"gate": "{file}:weigh"}]},
        {"model": {"trust_remote_code": True}},
        {"opsd.model.trust_remote_code": True},
    ],
)
def test_a_study_runs_no_code(settings, marker, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("opsd.cli.compare.run_jobs", lambda *_: pytest.fail("it runs"))
    verifier = tmp_path / "mine.py"
    verifier.write_text(CODE.format(marker=str(marker)))
    text = json.dumps(settings).replace("{file}", str(verifier))
    (tmp_path / "s.yaml").write_text(f"quickstart: tiny\nsettings: {text}\n")
    assert main(["compare", str(tmp_path / "s.yaml"), "--output", str(tmp_path / "o")]) == 1
    refused(capsys, "a study may run no code")
    assert not marker.exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"opsd": {"teacher": {"policy": "model", "path": "http://127.0.0.1:9"}}},
        {"opsd.teacher.mix": [{}, {"policy": "model", "path": "http://127.0.0.1:9"}]},
        {"opsd.teacher.routes": {"a": {}, "b": {"path": "http://127.0.0.1:9"}}},
        {"rollout": {"engine": "vllm_server", "server": "http://127.0.0.1:9"}},
        {"output": {"push_to_hub": "somebody/else"}},
        {"output.report_to": "wandb"},
    ],
)
def test_a_study_sends_nothing(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("opsd.cli.compare.run_jobs", lambda *_: pytest.fail("it runs"))
    text = json.dumps(settings)
    (tmp_path / "s.yaml").write_text(f"quickstart: tiny\nsettings: {text}\n")
    assert main(["compare", str(tmp_path / "s.yaml"), "--output", str(tmp_path / "o")]) == 1
    refused(capsys, "a study may send nothing to a server")


@pytest.mark.parametrize("of", ["teacher", "mix", "routes"])
def test_a_failed_steps_file_names_no_server_to_ask(of, files, tmp_path, capsys):
    server = HostileServer()
    member = {"policy": "model", "path": server.address}
    teacher = {
        "teacher": member,
        "mix": {"mix": [{}, member | {"context": "student", "coefficient": 0.5}]},
        "routes": {"routes": {"a": {"policy": "initial"}, "b": member}},
    }[of] | {"server_patience": 0.2}
    config = short_config(*files, tmp_path / "run", teacher=teacher)
    file = tmp_path / "failed-step-1.pt"
    group = {"student": [1], "samples": [{"rollout": [4], "weight": 1.0}], "teachers": [[1]]}
    more = {"mix": {"teachers": [[1]] * 2, "coefficients": [1.0, 0.5]}, "routes": {"route": "b"}}
    groups = [group | more.get(of, {})]
    failed = {"step": 1, "groups": groups, "weights": {}, "average": None, "images": False}
    torch.save({"config": config.model_dump(), **failed}, file)
    assert main(["replay", str(file)]) == 1
    refused(capsys, "its teacher.path is 'http://", "--ask-teacher allows it")
    if of != "teacher":
        server.stop()
        return
    server.replies["/teacher"] = response([])
    assert server.seen == []
    assert main(["replay", str(file), "--ask-teacher"]) == 1
    assert server.seen
    server.stop()


@pytest.mark.parametrize(
    "settings", [{"--output": "x"}, {"--model": {"a": 1}}, {"opsd.--no-share": True}, {"-h": 1}]
)
def test_a_studys_settings_are_no_options(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("opsd.cli.compare.run_jobs", lambda *_: pytest.fail("it runs"))
    (tmp_path / "s.yaml").write_text(f"quickstart: tiny\nsettings: {json.dumps(settings)}\n")
    assert main(["compare", str(tmp_path / "s.yaml"), "--output", str(tmp_path / "o")]) == 1
    refused(capsys, "settings: unknown key '-")
