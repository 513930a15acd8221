"""Files of strangers: what they hold is read, never run. See SECURITY.md."""

import json
import os
import pickle
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from helpers.hostile_server import HostileServer, response
from helpers.image_models import write_image_model
from helpers.payload import Payload
from helpers.saved import sealed
from helpers.training_cases import ROWS, short_config, short_values
from safetensors.torch import load_file, save_file

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.compare.comparison import compare
from opsd.compare.page import page as compare_page
from opsd.config.load import merge
from opsd.config.sections import ModelSection
from opsd.evaluate.answers import Completion
from opsd.evaluate.result import grade_all, measure
from opsd.grading.grader import Grader
from opsd.models.images import ImageReader
from opsd.models.load import check_directory, load_config, load_model, load_tokenizer
from opsd.objectives import Sample, SampleGroup
from opsd.report import write_report
from opsd.report.evaluation_page import page as evaluation_page
from opsd.runs.directory import _mark, locked
from opsd.runs.log import RunLog
from opsd.runs.records import Line, checked_lines
from opsd.training.failed_steps import failed_step, save_failed_step


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


def refused(capsys, *parts) -> None:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("opsd: "), lines
    for part in parts:
        assert part in lines[0], lines[0]


def test_the_payload_would_run(marker):
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


def copied(files, place: Path) -> Path:
    return shutil.copytree(files[0], place)


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
    for name in ("problems.json", "metrics.jsonl", "rollouts.jsonl"):
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


CODE = "import os\nos.mkdir({marker!r})\nraise SystemExit(7)\n"
AUTO = {
    "AutoConfig": "evil.Config",
    "AutoModelForCausalLM": "evil.Model",
    "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
}


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


def test_a_models_code_runs_only_where_the_user_says_so(
    with_code, files, train, marker, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks in the terminal"))
    assert train(f"model.path={with_code}") == 1
    refused(capsys, "model.trust_remote_code is false")
    assert train(f"model.path={with_code}", "--dry-run") == 1
    refused(capsys, "model.path is")
    assert main(["plan", str(with_code)]) == 1
    refused(capsys, "model.path is")
    for words in (
        ["eval", str(with_code), "--benchmark", str(files[1])],
        ["chat", str(with_code)],
        ["serve-teacher", str(with_code), "--port", "0"],
    ):
        assert main(words) == 1
        assert "MODEL" in capsys.readouterr().err.splitlines()[-1]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": str(with_code), "peft_type": "LORA", "r": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    assert main(["export", str(adapter), "--merge"]) == 1
    assert "trust_remote_code is false" in capsys.readouterr().err
    assert not marker.exists()
    with pytest.raises(SystemExit, match="7"):
        train(f"model.path={with_code}", "model.trust_remote_code=true", "--dry-run")
    assert marker.exists()


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("attn_implementation", "somebody/a-kernel", 1),
        ("attn_implementation", {"": "paged|somebody/a-kernel@main:f"}, 1),
        ("_attn_implementation", "somebody/a-kernel", 1),
        ("experts_implementation", "sonicmoe", 1),
        ("attn_implementation", "flash_attention_2", 0),  # taken from the hub where it is absent
        ("attn_implementation", "eager", 0),
    ],
)
def test_a_models_config_names_no_kernel_to_run(
    field, value, code, files, tmp_path, capsys, monkeypatch
):
    """transformers loads kernels, which are code, from the hub, where `kernels` is installed."""
    loads = lambda *_, **__: pytest.fail("it loads a kernel")  # noqa: E731
    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda *_: True)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", loads)
    model = copied(files, tmp_path / "model")
    values = json.loads((model / "config.json").read_text()) | {field: value}
    (model / "config.json").write_text(json.dumps(values))
    asked = ["--benchmark", str(files[1]), "--problems", "1", "--max-new-tokens", "2"]
    lengths = ["--prompt-tokens", "9", "--solution-tokens", "9", "rollout.max_new_tokens=9"]
    for words in (
        ["eval", str(model), *asked, "--output", str(tmp_path / "e")],
        ["plan", str(model), *lengths],
    ):
        assert main(words) == code
        if code:
            assert "a kernel from the hub is code" in capsys.readouterr().err.splitlines()[-1]


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


def test_a_processor_of_images_runs_no_code(tmp_path, marker):
    model = write_image_model(tmp_path / "model")
    values = json.loads((model / "preprocessor_config.json").read_text())
    values |= {"auto_map": {"AutoImageProcessor": "evil.Processor"}, "image_processor_type": "Evil"}
    (model / "preprocessor_config.json").write_text(json.dumps(values))
    (model / "evil.py").write_text(CODE.format(marker=str(marker)))
    section = ModelSection(path=str(model))
    config, tokenizer = load_config(check_directory(section, "model")), load_tokenizer(section)
    with pytest.raises(UserError, match="it has no processor of images"):
        ImageReader(section, config, tokenizer, "model")
    assert not marker.exists()


def test_a_converter_runs_no_models_code(files, tmp_path, capsys, monkeypatch):
    """llama.cpp's own trusts the code of whatever it converts."""
    model = copied(files, tmp_path / "model")
    values = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(values | {"auto_map": AUTO}))
    (tmp_path / "convert_hf_to_gguf.py").touch()
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    monkeypatch.setattr("opsd.cli.export._convert", lambda *_: pytest.fail("it runs"))
    assert main(["export", str(model), "--gguf"]) == 1
    refused(capsys, "tokenizer_config.json has code (auto_map)")
    assert sorted(model.glob(".*")) == []


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


# Pages. A browser sets the page's title, and with it its DOM, if it runs any of these.

RUN = "document.title='it has run'"
HOSTILE = r"$\frac_{$ "  # nor may matplotlib take it for a formula
HOSTILE += (
    f'</script><script>{RUN}</script>"><img src=x onerror={RUN}><svg onload={RUN}>'
    f"</textarea></style></title>'-{RUN}-'<!--<script>\u2028{{{{ {RUN} }}}}"
)


def hostile_pages(directory: Path) -> list[Path]:
    """The report, the comparison and the evaluation of a run in which every text is HOSTILE."""
    run = directory / "run"
    run.mkdir()
    token = {"text": HOSTILE, "divergence": 0.5, "student_probability": 0.5}
    shown = {"problem": HOSTILE, "solution": HOSTILE, "answer": HOSTILE, "completion": HOSTILE}
    place = [{"step": s, "generated_tokens": 9 * s, "trained_tokens": 9 * s} for s in (0, 1)]
    lines = {
        "samples": [
            {**p, **shown, "method": HOSTILE, "correct": True,
             "tokens": [{**token, "teacher": [[HOSTILE, 0.9]]}]} for p in place
        ],
        "evaluations": [
            {**p, "role": "student", "accuracy": 0.2 + 0.1 * p["step"], "problems": 9}
            for p in place
        ],
        "metrics": [{**place[1], "loss": 1.0, "seconds": 1.0, "method": HOSTILE}],
    }  # fmt: skip
    for name, records in lines.items():
        (run / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    facts = {"model": HOSTILE, "machine": {HOSTILE: HOSTILE}, "versions": {HOSTILE: HOSTILE}}
    (run / "summary.json").write_text(json.dumps({"method": "opsd", **facts}))
    (run / "config.yaml").write_text(yaml.safe_dump({"method": HOSTILE, "model": HOSTILE}))
    pages = [Path(write_report(run)["report"])]
    (run / "summary.json").write_text(json.dumps({"method": HOSTILE, **facts}))
    pages.append(directory / "comparison.html")
    pages[-1].write_text(compare_page(compare([run], target=0.25)))
    rows = [ROWS[0].__class__(HOSTILE, HOSTILE, "2", {"problem": HOSTILE})]
    with Grader() as grader:
        answers = grade_all(rows, [Completion(0, 0, HOSTILE, 5, True)], grader)
        figures = measure(answers, grader)
    facts = {"model": HOSTILE, "benchmark": HOSTILE, "max_new_tokens": 9, "thinking": None}
    pages.append(directory / "evaluation.html")
    pages[-1].write_text(evaluation_page({**facts, **figures}, rows, answers))
    return pages


class Scripts(HTMLParser):
    """The scripts and event handlers of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.inside = [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        self.found += [f"{key}={value}" for key, value in attributes if key.startswith("on")]
        self.found += [tag] if tag in ("img", "iframe", "object", "embed", "base") else []

    def handle_data(self, data):
        if self.inside == "script" and not data.lstrip().startswith(("{", "[")):
            self.found.append(data)


def test_pages_run_nothing_that_they_show(tmp_path):
    for path in hostile_pages(tmp_path):
        text = path.read_text(encoding="utf-8")
        assert "it has run" in text  # it is shown
        for script in Scripts(text).found:
            assert "it has run" not in script and not script.startswith("on"), path


if "OPSD_BROWSER" in os.environ:  # asked for by name, as SECURITY.md says: not everybody has one

    def test_pages_run_nothing_in_a_browser(tmp_path):
        """OPSD_BROWSER=chromium pytest tests/test_security.py -k browser"""

        def title(path: Path) -> str:
            command = [os.environ["OPSD_BROWSER"], "--headless", "--no-sandbox", "--disable-gpu"]
            command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{path}"]
            shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
            return shown.stdout.partition("<title>")[2].partition("</title>")[0]

        trap = tmp_path / "trap.html"
        trap.write_text(f"<title>t</title><p>{HOSTILE}")
        assert title(trap) == "it has run"  # this browser would
        for path in hostile_pages(tmp_path):
            assert title(path) != "it has run", path


def test_a_torn_log_is_one_line(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n\x00\x00\n{"step": 3}\n{"st')
    with pytest.raises(UserError, match=r"m\.jsonl' is damaged in line 2"):
        list(checked_lines(tmp_path / "m.jsonl", Line))
