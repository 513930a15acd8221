"""Steps that fail: numbers that are not finite, memory that runs out, two runs in one directory."""

import errno
import math
import mmap
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.lines import read_lines
from helpers.training_cases import short_config
from safetensors.torch import load_file
from transformers import TrainerCallback

from opsd.cli.main import main
from opsd.common.display import Display
from opsd.common.errors import UserError
from opsd.common.step_timer import StepTimer, Watch, measured, phase, resident
from opsd.config.load import save_config
from opsd.objectives import OPSD
from opsd.runs.directory import _mark, locked
from opsd.training.replay import replay
from opsd.training.step import OPSDStep

ONCE = {"train": {"save_every": 1, "save_total_limit": 4}, "eval": {"problems": 0}}


pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def run(files, tmp_path):
    """Runs `opsd train`; returns its exit code."""

    def go(*overrides, **sections):
        config = short_config(*files, tmp_path / "run", **{**ONCE, **sections})
        save_config(config, tmp_path / "config.yaml")
        return main(["train", str(tmp_path / "config.yaml"), *overrides])

    return go


def spoil(monkeypatch, calls, value=math.nan):
    """Multiplies the loss of these calls (from 1) of the objective by a number."""
    count, plain = [0], OPSD.loss

    def loss(self, *arguments, **more):
        count[0] += 1
        result = plain(self, *arguments, **more)
        return result * value if count[0] in calls else result

    monkeypatch.setattr(OPSD, "loss", loss)


@pytest.mark.parametrize("value", [math.nan, 1e39])
def test_a_step_that_is_not_finite_stops_the_run_and_can_be_replayed(
    value, run, tmp_path, monkeypatch, capsys
):
    """1e39 is inf in fp32: the loss is inf at once."""
    spoil(monkeypatch, {2}, value)
    assert run() == 1
    message = capsys.readouterr().err.splitlines()[-1]
    path = tmp_path / "run" / "failed-step-2.pt"
    assert "step 2: its loss is" in message and f"opsd replay {path}" in message
    assert (tmp_path / "run" / "checkpoint-1").is_dir()
    monkeypatch.undo()
    failed = torch.load(path, weights_only=True)
    checkpoint = load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors")
    assert all(torch.equal(failed["weights"][key], checkpoint[key]) for key in checkpoint)
    # The spoilt factor was not the batch's fault.
    found = replay(path, Display(quiet=True))
    assert len(found) == 3 and all(sample.finite and sample.gradient > 0 for sample in found)
    # With a weight that is, the replay names where.
    name = "model.layers.1.mlp.up_proj.weight"
    failed["weights"][name][0, 0] = math.inf
    torch.save(failed, path)
    assert main(["replay", str(path)]) == 0
    found = replay(path, Display(quiet=True))
    assert all(not sample.finite for sample in found)
    assert {sample.module for sample in found} == {"model.layers.1.mlp.up_proj"}


def test_a_gradient_that_is_not_finite_is_found(run, tmp_path, monkeypatch, capsys):
    plain = OPSDStep.forward

    def forward(self, samples, totals):
        loss = plain(self, samples, totals)
        return loss + 0 * (loss.detach() * 0 + self.model.lm_head.weight[0, 0] - 1e30).square()

    monkeypatch.setattr(OPSDStep, "forward", forward)
    assert run() == 1
    assert "step 1: its " in capsys.readouterr().err


def test_steps_that_are_not_finite_are_left_out_on_demand(run, tmp_path, monkeypatch):
    spoil(monkeypatch, {2})
    assert run("train.not_finite=skip") == 0
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line.get("left_out") for line in lines] == [None, 1, None, None]
    assert lines[1]["loss"] is None and all(
        line["loss"] > 0 for line in lines if line is not lines[1]
    )
    weights = [
        load_file(tmp_path / "run" / f"checkpoint-{n}" / "model.safetensors") for n in (1, 2, 3)
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert any(not torch.equal(weights[1][key], weights[2][key]) for key in weights[0])


def test_a_run_does_not_go_on_leaving_steps_out(run, monkeypatch, capsys):
    spoil(monkeypatch, {1, 2, 3, 4})
    assert run("train.not_finite=skip") == 1
    assert "step 3" in (message := capsys.readouterr().err.splitlines()[-1])
    assert "(3 steps in a row)" in message


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
def test_micro_batches_are_halved_where_memory_runs_out(error, files, tmp_path, monkeypatch):
    """The second of two micro-batches does not fit: the step is what smaller ones make of it."""
    sizes, plain = [], OPSDStep.forward

    def forward(self, samples, totals):
        sizes.append(len(samples))
        if len(samples) > 2:
            if len(sizes) > 1:
                plain(self, samples, totals).backward()  # a gradient that must not count
            raise error
        return plain(self, samples, totals)

    outcomes = []
    for name in ("plain", "full"):
        config = short_config(
            *files,
            tmp_path / name,
            **{
                **ONCE,
                "train": {"steps": 1, "save_every": 1, "problems_per_step": 6},
            },
        )
        save_config(config, tmp_path / f"{name}.yaml")
        if name == "full":
            monkeypatch.setattr(OPSDStep, "forward", forward)
        assert main(["train", str(tmp_path / f"{name}.yaml"), "train.micro_batch_tokens=400"]) == 0
        (line,) = read_lines(tmp_path / name / "metrics.jsonl")
        outcomes.append((line["loss"], line["grad_norm"]))
    assert max(sizes) > 2 and sizes[-1] <= 2
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-5)


def test_memory_that_never_suffices_is_one_line(run, monkeypatch, capsys):
    def forward(self, samples, totals):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr(OPSDStep, "forward", forward)
    assert run("train.micro_batch_tokens=100") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "train.micro_batch_tokens is" in message and "memory has run out" in message


HOLD = """
import sys, time
from pathlib import Path
from opsd.runs.directory import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_in_one_directory_are_refused(run, tmp_path, capsys):
    directory = tmp_path / "run"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        assert run() == 1
        message = capsys.readouterr().err.splitlines()[-1]
        assert f"process {other.pid} is training there, on {platform.node()} since 2" in message
        assert f" by `-c {directory}`; wait for it" in message
    finally:
        other.kill()
        other.wait()
    assert run("train.steps=1") == 0  # the lock has ended with its process


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_the_living_process_has_the_directory(
    number, tmp_path, monkeypatch
):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    directory, notes = tmp_path / "run", []
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setattr("fcntl.flock", flock)
    with locked(directory, note=notes.append):
        assert len(notes) == 1 and "no locks there" in notes[0]
        assert (directory / "run.lock").read_text().startswith(f"{os.getpid()} ")
    try:
        (directory / "run.lock").write_text(_mark(other.pid) + "\n")
        with pytest.raises(UserError, match=f"process {other.pid} is training there"):
            with locked(directory):
                pass
    finally:
        other.kill()
        other.wait()
    for stale in (f"{other.pid} 1.00 elsewhere", "1 1.00 x", "nonsense", "-1", "", "9" * 99):
        (directory / "run.lock").write_text(stale + "\n")
        with locked(directory):
            pass


def test_what_a_killed_run_left_is_cleared(run, tmp_path):
    directory, once = tmp_path / "run", "train.steps=1"
    assert run(once) == 0
    for name in ("checkpoint.part", "model.part"):
        (directory / name).mkdir()
    (directory / "summary.json.part").touch()
    assert run(once, "--resume") == 0
    assert not list(directory.glob("*.part"))


def test_parts_of_a_step_are_measured(run, tmp_path):
    assert run() == 0
    names = ("rollout", "grading", "teacher", "student", "loss", "backward", "optimizer")
    for line in read_lines(tmp_path / "run" / "metrics.jsonl"):
        assert all(line[f"{name}_seconds"] > 0 for name in names)
        assert all(line[f"{name}_peak_bytes"] > 50e6 for name in names)


def test_the_most_memory_of_a_part_is_seen():
    parts = StepTimer(torch.device("cpu"))
    before = resident()
    with measured(parts):
        with phase("large"):
            # Not from malloc, which may put it in a hole of the heap, and keeps that when freed.
            block = mmap.mmap(-1, 80 << 20)
            for page in range(0, len(block), mmap.PAGESIZE):
                block[page] = 1
        block.close()
        with phase("small"):
            pass
    found = parts.take()
    assert found["large_peak_bytes"] >= before + (75 << 20)
    assert found["small_peak_bytes"] < found["large_peak_bytes"]
    assert parts.take() == {}
    with phase("large"):  # nobody measures
        pass
    assert parts.take() == {}


def test_a_look_that_has_begun_does_not_undo_a_restart(monkeypatch):
    monkeypatch.setattr("opsd.common.step_timer.INTERVAL", 60)
    watch = Watch()
    restart = threading.Thread(target=watch.restart)

    def memory() -> int:
        if threading.current_thread() is not threading.main_thread():
            return 1
        restart.start()  # while the look is under way
        restart.join(0.1)
        return 100

    monkeypatch.setattr("opsd.common.step_timer.resident", memory)
    watch.look()
    restart.join()
    monkeypatch.setattr("opsd.common.step_timer.resident", lambda: 2)
    assert watch.peak() == 2


def test_a_watch_ends_with_its_owner():
    watch = Watch()
    thread = watch.thread
    assert watch.peak() > 0 and thread.is_alive()
    del watch
    thread.join(timeout=10)
    assert not thread.is_alive()


OPTIMIZERS = [
    ("adamw_torch_fusd", "no optimizer of transformers; did you mean 'adamw_torch_fused'?"),
    ("adamw_bnb_8bit", "train.optimizer is 'adamw_bnb_8bit': "),
    ("galore_adamw", "train.optimizer is 'galore_adamw': "),
]


@pytest.mark.parametrize(("name", "wanted"), OPTIMIZERS)
def test_optimizers_that_cannot_be_made_are_one_line(name, wanted, run, tmp_path, capsys):
    assert run(f"train.optimizer={name}") == 1
    assert wanted in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["adafactor", "sgd", "rmsprop"])
def test_another_optimizer_trains(name, run, tmp_path):
    assert run(f"train.optimizer={name}", "train.steps=2", "train.warmup_steps=0") == 0
    saved = torch.load(tmp_path / "run" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    keys = {key for state in saved["state"].values() for key in state}
    assert ("exp_avg" in keys) is False and saved["param_groups"][0]["lr"] > 0


class Hub:
    """Stands in for the hub's client."""

    calls: list = []  # noqa: RUF012
    broken = False

    def whoami(self):
        return {"name": "someone"}

    def create_repo(self, repository, private, exist_ok):
        self.calls.append(("create", repository, private, exist_ok))
        return SimpleNamespace(repo_id=repository)

    def auth_check(self, repository, write):
        self.calls.append(("check", repository, write))

    def upload_folder(self, repo_id, folder_path):
        if self.broken:
            raise ConnectionError("gone")
        names = sorted(path.name for path in Path(folder_path).iterdir())
        self.calls.append(("upload", repo_id, names))
        return f"https://hub/{repo_id}"


@pytest.mark.parametrize("broken", [False, True])
def test_a_model_is_uploaded_and_kept_if_that_fails(broken, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("opsd.common.hub_upload.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(Hub, "broken", broken)
    assert (
        run("train.steps=1", output={"push_to_hub": "me/mine", "dir": str(tmp_path / "run")}) == 0
    )
    shown = capsys.readouterr().out
    assert Hub.calls[0] == ("create", "me/mine", True, True)
    if broken:
        assert "The upload failed (gone)" in shown and "hf upload me/mine" in shown
    else:
        assert "model.safetensors" in Hub.calls[-1][2] and "https://hub/me/mine" in shown
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_hub_that_cannot_be_used_is_one_line(run, tmp_path, monkeypatch, capsys):
    assert run("output.push_to_hub=a/b/c") == 1
    assert "output.push_to_hub is 'a/b/c'" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(
        "opsd.common.hub_upload.HfApi.whoami", lambda self: (_ for _ in ()).throw(OSError("no"))
    )
    assert run("output.push_to_hub=me/mine") == 1
    assert "the hub cannot be reached (no)" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_logger_that_is_not_installed_is_one_line(run, monkeypatch, capsys):
    monkeypatch.setattr("opsd.config.requirements.find_spec", lambda package: None)
    assert run("output.report_to=[wandb]") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "output.report_to is 'wandb': it needs pip install wandb" in message


def test_steps_reach_transformers_loggers(run, tmp_path, monkeypatch):
    """W&B and TensorBoard are callbacks of transformers; this one notes what they are given: steps,
    each evaluation with its completions, and the end after all of them."""
    seen, tables, ended = [], [], []

    class Logger(TrainerCallback):
        @property
        def tb_writer(self):
            return self

        def add_text(self, name, text, step):
            assert not ended
            tables.append((name, text, step))

        def on_train_end(self, *_, **__):
            ended.append(len(seen))

        def on_log(self, args, state, control, logs=None, **_):
            seen.append((list(args.report_to), state.global_step, logs))

    monkeypatch.setattr("opsd.config.requirements.find_spec", lambda package: package)
    monkeypatch.setattr(
        "opsd.training.reporters.get_reporting_integration_callbacks", lambda names: [Logger]
    )
    assert run(output={"report_to": ["tensorboard"], "dir": str(tmp_path / "run")}) == 0
    steps = [logs for _, _, logs in seen if "divergence" in logs]
    assert seen[0][0] == ["tensorboard"] and len(steps) == 4
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    for logged, line in zip(steps, lines, strict=True):
        wanted = {k: v for k, v in line.items() if isinstance(v, int | float)}
        assert wanted and {k: logged.get(k) for k in wanted} == wanted
    evaluations = read_lines(tmp_path / "run" / "evaluations.jsonl")
    logged = [(step, logs) for _, step, logs in seen if "eval_accuracy" in logs]
    assert [step for step, _ in logged] == [line["step"] for line in evaluations]
    for (_, logs), line in zip(logged, evaluations, strict=True):
        for name in ("accuracy", "low", "high", "mean_length"):
            assert logs[f"eval_{name}"] == line[name]
    assert [step for _, _, step in tables] == [line["step"] for line in evaluations]
    assert all(
        text.count("\n") == 1 + line["problems"]
        for (_, text, _), line in zip(tables, evaluations, strict=True)
    )
    assert ended == [len(seen)]


def test_accelerates_own_splitting_is_refused(run, monkeypatch, capsys):
    for name, wanted in (("DEEPSPEED", "told to use DeepSpeed"), ("FSDP", "train.sharding=fsdp2")):
        monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
        assert run() == 1
        assert wanted in capsys.readouterr().err.splitlines()[-1]
        monkeypatch.delenv(f"ACCELERATE_USE_{name}", raising=False)
