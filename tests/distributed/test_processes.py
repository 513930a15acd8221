"""Two processes train as one does: the same losses and weights, one set of files, bit-equal resume.

Each case is `opsd train` in two processes over gloo, as torchrun would start them. Rollouts draw
from the likeliest token alone, so that they do not depend on who draws them.
"""

import gc
import itertools
import json
import math
import os
import random
import shutil
import socket
import time
from contextlib import ExitStack, redirect_stderr, suppress
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
import torch.multiprocessing as mp
from helpers.lines import read_lines
from helpers.payload import Payload
from helpers.training_cases import ROWS, short_values, write_model, write_rows
from helpers.vllm_server import FakeVLLM
from safetensors.torch import load_file
from transformers import AutoTokenizer

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.config.load import merge, parse_config, save_config
from opsd.grading.grader import Grade
from opsd.objectives import OPSD, Sample, SampleGroup, samples_of
from opsd.training import run as training
from opsd.training.checkpoints import check_pieces
from opsd.training.micro_batches import shares, stream_tokens
from opsd.training.preflight import check_machine

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

SAME = {"rollout": {"top_k": 1, "group_size": 2}}
LORA = {"model": {"lora": {"rank": 4, "alpha": 8}}}
CASES = {
    "ema": {
        "teacher": {"policy": "ema"},
        "train": {"micro_batch_tokens": 60, "gradient_checkpointing": True},
    },
    "lora": {**LORA, "train": {"gradient_checkpointing": "reentrant", "micro_batch_tokens": 60}},
    "grpo": {"method": "grpo", "rollout": {"top_k": 0, "group_size": 4}},
    "fsdp2": {
        "teacher": {"policy": "live"},
        "train": {"sharding": "fsdp2", "gradient_checkpointing": True, "micro_batch_tokens": 60},
    },
    # Only some micro-batches distil, so a process may have one that the live teacher does not see.
    "fsdp2-distil": {
        "method": "grpo",
        "loss": {"distil": 0.5, "distil_groups": "all_wrong", "sft_alpha": 0.5},
        "teacher": {"policy": "live"},
        "train": {"sharding": "fsdp2", "micro_batch_tokens": 60},
    },
    "fsdp2-lora": {**LORA, "train": {"sharding": "fsdp2"}},
    "zero1": {"train": {"sharding": "zero1", "micro_batch_tokens": 60, "mini_batches": 3}},
    "zero2": {"train": {"sharding": "zero2", "micro_batch_tokens": 60}},
    "zero3": {
        "teacher": {"policy": "live"},
        "loss": {"sft_alpha": 0.5},
        "train": {"sharding": "zero3", "gradient_checkpointing": True, "micro_batch_tokens": 60},
    },
}
SERVER = "fsdp2-server"  # whose config is known when there is a server
AHEAD = "server-ahead"  # as is this one's
SPOILT = "zero3-spoilt"
UNSAVABLE = "unsavable"  # its tokenizer has a template that cannot be written
RESUMED = ("ema", "fsdp2", "zero2", "zero3", AHEAD)


class Parity:
    """Grades by the digits' sum, so that rollouts of a random model differ."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def grade(self, completions, answers):
        sums = [sum(map(int, filter(str.isdigit, text))) for text in completions]
        return [Grade(bool(total % 2), "", None) for total in sums]


def config_of(name: str, root: Path, where: str):
    values = short_values(root / "model", root / "rows.jsonl", root / where / name)
    values = merge(values, {**SAME, "eval": {"problems": 2, "samples": 1}})
    values = merge(values, CASES[name])
    if where == "one":
        values = merge(values, {"train": {"sharding": "none"}})
    return parse_config(values)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directory of all cases' runs: two/<case>, and again/<case> of those resumed."""
    root = tmp_path_factory.mktemp("runs")
    write_model(root / "model")
    write_rows(root / "rows.jsonl")
    server = FakeVLLM(root / "model")
    rollout = {"engine": "vllm_server", "server": server.address}
    train = {"sharding": "fsdp2", "precision": "bf16"}
    CASES[SERVER] = {"rollout": rollout, "teacher": {"policy": "ema"}, "train": train}
    other = FakeVLLM(root / "model")
    CASES[AHEAD] = {"rollout": {**rollout, "server": other.address, "ahead": 1, "top_k": 0}}
    CASES[SPOILT] = {
        "train": {"sharding": "zero3", "not_finite": "skip", "save_every": 1, "save_total_limit": 4}
    }
    shutil.copytree(root / "model", root / "unsavable")
    file = root / "unsavable" / "tokenizer_config.json"
    (root / "unsavable" / "chat_template.jinja").unlink(missing_ok=True)
    template = AutoTokenizer.from_pretrained(root / "model").chat_template
    named = [{"name": "default", "template": template}, {"name": "a/b", "template": "x"}]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": named}))
    CASES[UNSAVABLE] = {"model": {"path": str(root / "unsavable")}}
    jobs = [(name, "two", False) for name in CASES] + [(name, "again", True) for name in RESUMED]
    for name, where, *_ in jobs:
        save_config(config_of(name, root, where), root / f"{where}-{name}.yaml")
    with_ports = [(*job, port) for job, port in zip(jobs, _ports(len(jobs)), strict=True)]
    mp.spawn(_process, args=(root, with_ports), nprocs=2)
    server.stop()
    other.stop()
    (root / "reloads").write_text(str(len(server.reloads)))
    return root


def _ports(count: int) -> list[str]:
    """Free ports, no two alike, below those that the system hands out: another process would be
    given one before the run listens there. A run's store may outlive it, kept by what has used it,
    and torch lets a store of the same process on the same port share it: the next run's second
    process would be looked for where it listened before, for ever.
    """
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            while probe.getsockname()[1] == 0:
                with suppress(OSError):  # taken
                    probe.bind(("localhost", random.SystemRandom().randrange(15_000, 30_000)))
        return [str(probe.getsockname()[1]) for probe in probes]


def _process(rank: int, root: Path, jobs) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # see tests/conftest.py
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="localhost", LOCAL_WORLD_SIZE="2")
    training.Grader, training.write_report = lambda strict: Parity(), lambda directory: None
    for name, where, resume, port in jobs:
        os.environ["MASTER_PORT"] = port
        # accelerate leaves notes for itself, that of FSDP too; a process trains once elsewhere.
        for key in [key for key in os.environ if key.startswith(("ACCELERATE_", "FSDP_"))]:
            del os.environ[key]
        path = root / f"{where}-{name}.yaml"
        if resume and rank == 0:
            _interrupt(root / "two" / name, root / where / name, path)
        while resume and not (root / where / name / "config.yaml").exists():
            time.sleep(0.01)
        with pytest.MonkeyPatch.context() as patch:
            if name == SPOILT and rank == 1:
                _spoil(patch)
            with ExitStack() as stack:
                if name == UNSAVABLE:
                    said = stack.enter_context((root / f"said-{rank}").open("w"))
                    stack.enter_context(redirect_stderr(said))
                code = main(["train", str(path), *(["--resume"] if resume else [])])
                assert code == (name == UNSAVABLE), name


def _spoil(patch) -> None:
    """The loss of the second step is not finite, though its gradient is."""
    plain, calls = OPSD.loss, itertools.count(1)

    def loss(self, *arguments, **more):
        return plain(self, *arguments, **more) + (math.nan if next(calls) == 2 else 0.0)

    patch.setattr(OPSD, "loss", loss)


def _interrupt(finished: Path, other: Path, config: Path) -> None:
    """What a run leaves that is killed after its third step."""
    other.mkdir(parents=True)
    shutil.copytree(finished / "checkpoint-2", other / "checkpoint-2")
    for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl"):
        shutil.copy(finished / name, other / name)
    shutil.copy(config, other / "config.yaml.part")
    (other / "config.yaml.part").rename(other / "config.yaml")


def weights(directory: Path) -> dict[str, torch.Tensor]:
    (path,) = (directory / "model").glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize("name", [name for name in CASES if name != "grpo"])
def test_two_processes_train_as_one(name, runs):
    config = config_of(name, runs, "one")
    save_config(config, runs / f"one-{name}.yaml")
    assert main(["train", str(runs / f"one-{name}.yaml")]) == 0
    one, two = runs / "one" / name, runs / "two" / name
    metrics = [read_lines(place / "metrics.jsonl") for place in (one, two)]
    assert [line["step"] for line in metrics[1]] == [1, 2, 3, 4]
    for a, b in zip(*metrics, strict=True):
        for key in ("generated_tokens", "trained_tokens", "rollout_length"):
            assert a[key] == b[key], key
        for key in ("loss", "student_entropy", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-7), key
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    start = weights(runs) if "lora" not in name else None
    for key, value in first.items():
        # Adam divides by the root of tiny squares: where a gradient is rounding, so is its step,
        # which is a learning rate long.
        difference = (value - second[key]).abs()
        assert difference.max() < 5e-3 and difference.mean() < 2e-5, key
    if start is not None:
        assert any(not torch.equal(first[key], start[key]) for key in first)


@pytest.mark.parametrize("name", [*CASES, SERVER])
def test_files_are_written_once(name, runs):
    directory = runs / "two" / name
    assert [line["step"] for line in read_lines(directory / "metrics.jsonl")] == [1, 2, 3, 4]
    steps = [line["step"] for line in read_lines(directory / "evaluations.jsonl")]
    assert steps == [0, 2, 4]
    assert [line["step"] for line in read_lines(directory / "samples.jsonl")] == [0, 2, 4]
    assert json.loads((directory / "summary.json").read_text())["trained_tokens"] > 0
    found = sorted(path.name for path in directory.glob("checkpoint*"))
    assert found == ["checkpoint-2", "checkpoint-4"]
    states = sorted(path.name for path in (directory / "checkpoint-4").glob("rng_state*"))
    assert states == ["rng_state_0.pth", "rng_state_1.pth"]


def test_processes_draw_different_rollouts(runs):
    """Under grpo, whose four rollouts of a problem are drawn by turns."""
    lines = read_lines(runs / "two" / "grpo" / "metrics.jsonl")
    assert all(line["informative_groups"] > 0 and line["grad_norm"] > 0 for line in lines)
    first, second = (
        torch.load(
            runs / "two" / "grpo" / "checkpoint-2" / f"rng_state_{rank}.pth", weights_only=False
        )["cpu"]
        for rank in (0, 1)
    )
    assert not torch.equal(first, second)


def test_one_process_gives_a_server_the_weights(runs):
    """Before each of four steps and three evaluations."""
    assert (runs / "reloads").read_text() == "7"
    lines = read_lines(runs / "two" / SERVER / "metrics.jsonl")
    # bf16 against the server's fp32: that the weights are the same, not more.
    assert all(abs(line["engine_divergence"]) < 0.1 for line in lines)


def test_two_processes_sample_ahead(runs):
    """The four rollouts of a step's two problems are by one update before, those of both."""
    directory = runs / "two" / AHEAD
    lines = read_lines(directory / "metrics.jsonl")
    assert [line["rollout_age"] for line in lines] == [0, 1, 1, 1]
    apart = [abs(line["importance_ratio"] - 1) for line in lines]
    assert apart[0] < 1e-4 < min(apart[1:])
    assert (directory / "checkpoint-2" / "rollouts_ahead.pt").is_file()
    assert not (directory / "checkpoint-4" / "rollouts_ahead.pt").exists()


@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_resume_bit_for_bit(name, runs):
    whole, again = runs / "two" / name, runs / "again" / name
    losses = [
        [(line["step"], line["loss"]) for line in read_lines(place / "metrics.jsonl")]
        for place in (whole, again)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    first, second = weights(whole), weights(again)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_one_process_goes_on_with_what_two_began(runs):
    config = config_of("ema", runs, "fewer")
    _interrupt(runs / "two" / "ema", Path(config.output.dir), runs / "two-ema.yaml")
    save_config(config, runs / "fewer.yaml")
    save_config(config, Path(config.output.dir) / "config.yaml")
    assert main(["train", str(runs / "fewer.yaml"), "--resume"]) == 0
    two, one = (read_lines(runs / name / "ema" / "metrics.jsonl") for name in ("two", "fewer"))
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-4)


def test_deepspeed_refuses_a_step_that_is_not_finite(runs):
    """In one of the processes, and by its loss alone."""
    directory = runs / "two" / SPOILT
    lines = read_lines(directory / "metrics.jsonl")
    assert [line.get("left_out") for line in lines] == [None, 1, None, None]
    assert (directory / "failed-step-2.pt").is_file()
    saved = [load_file(directory / f"checkpoint-{n}" / "model.safetensors") for n in (1, 2, 3)]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])
    assert any(not torch.equal(saved[1][key], saved[2][key]) for key in saved[0])


def test_what_cannot_be_saved_ends_all_processes_with_one_line(runs):
    first, second = ((runs / f"said-{rank}").read_text() for rank in (0, 1))
    assert "could be trained but not saved" in first.splitlines()[-1] and second == ""
    assert not (runs / "two" / UNSAVABLE / "metrics.jsonl").exists()


def test_zero_needs_deepspeed(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "opsd.config.requirements.find_spec", lambda package: package != "deepspeed"
    )
    values = short_values(tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "run")
    config = parse_config(merge(values, {"train": {"sharding": "zero2"}}))
    with pytest.raises(UserError, match=r"train.sharding is 'zero2': it needs pip install"):
        check_machine(config, makes=False)


def test_zero_goes_on_with_as_many_processes(runs):
    checkpoint = runs / "two" / "zero2" / "checkpoint-4"
    check_pieces(checkpoint, 2)
    with pytest.raises(UserError, match=r"was written by 2 processes, and there are 3"):
        check_pieces(checkpoint, 3)


def test_a_piece_runs_nothing(runs, tmp_path):
    """DeepSpeed would read any pickle, and from anywhere."""
    checkpoint, marker = tmp_path / "checkpoint-4", tmp_path / "marker"
    shutil.copytree(runs / "two" / "zero2" / "checkpoint-4", checkpoint)
    piece = checkpoint / "global_step4" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    torch.save(Payload(marker), piece)
    with pytest.raises(UserError, match=r"cannot be read \(\w+: Weights only load"):
        check_pieces(checkpoint, 2)
    piece.write_bytes(piece.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        check_pieces(checkpoint, 2)
    with ZipFile(piece, "w") as archive:
        archive.writestr("archive/version", bytes(2 << 20))
    with pytest.raises(UserError, match="archive/version in it has 2,097,152 bytes"):
        check_pieces(checkpoint, 2)
    (checkpoint / "latest").write_text(str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="latest names /"):
        check_pieces(checkpoint, 2)
    assert not marker.exists()


def test_shares_are_fair_and_keep_contexts_together():
    lengths = ((9, 9), (4,), (5, 3, 2), (8,), (30, 30, 30, 30))
    groups = [
        SampleGroup([n] * 5, [Sample([1] * length, 1.0) for length in group])
        for n, group in enumerate(lengths)
    ]
    for count in (1, 2, 3):
        parts = shares(groups, count)
        assert len(parts) == count
        samples = [id(s) for part in parts for s in samples_of(part)]
        assert sorted(samples) == sorted(map(id, samples_of(groups)))
        loads = [stream_tokens(part).student for part in parts]
        assert max(loads) - min(loads) <= 35
        for group in groups[:-1]:
            assert sum(own.student is group.student for part in parts for own in part) == 1
    assert shares([], 2) == [[], []]
    # Fewer samples than processes: one has none, and runs an idle batch.
    assert sorted(map(len, shares(groups[1:2], 2))) == [0, 1]


@pytest.mark.parametrize("sharding", ["fsdp2", "zero1"])
def test_sharding_needs_several_processes(sharding, tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    values = short_values(tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "run")
    config = parse_config(merge(values, {"train": {"sharding": sharding}}))
    save_config(config, tmp_path / "config.yaml")
    assert main(["train", str(tmp_path / "config.yaml")]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert (
        f"train.sharding is {sharding!r}: there is one process" in message and "torchrun" in message
    )
