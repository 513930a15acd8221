"""Whole runs on a GPU: a CPU's losses, and what only a GPU can do.

python -m pytest tests -m gpu
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import yaml
from helpers.lines import read_lines
from helpers.training_cases import short_values

from opsd.config.load import merge

pytestmark = [
    pytest.mark.gpu,
]

LORA = {"model": {"lora": {"rank": 4, "alpha": 8}}}
GIVEN = {"rollout": {"source": "reference"}}  # no rollouts, which differ with the device's rounding


@pytest.fixture
def run(files, tmp_path):
    """(name, sections, environment) → the metrics of a run in a process of its own."""

    def trained(name: str, sections: dict, processes: int = 1, **environment: str) -> list[dict]:
        values = merge(short_values(*files, tmp_path / name), sections)
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(values))
        command = ["-m", "opsd", "train", str(config)]
        if processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone"]
            command = [*launcher, f"--nproc-per-node={processes}", *command]
        done = subprocess.run(
            [sys.executable, *command],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return read_lines(tmp_path / name / "metrics.jsonl")

    return trained


def assert_same_losses(found: list[dict], wanted: list[dict]) -> None:
    assert len(found) == len(wanted) == 4
    for a, b in zip(found, wanted, strict=True):
        for key in ("loss", "student_entropy", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-3), (a["step"], key)


@pytest.mark.parametrize(
    "sections",
    [
        GIVEN,
        merge(GIVEN, {"teacher": {"policy": "live"}, "train": {"gradient_checkpointing": True}}),
        merge(GIVEN, {"teacher": {"policy": "ema", "ema_decay": 0.5}, **LORA}),
        merge(GIVEN, {"loss": {"divergence": "jsd", "clip": "token"}}),
        {"method": "sft", "train": {"micro_batch_tokens": 100}},
    ],
)
def test_a_gpus_losses_are_a_cpus(sections, run):
    assert_same_losses(run("gpu", sections), run("cpu", sections, CUDA_VISIBLE_DEVICES=""))


def test_an_offloaded_teacher_is_the_same_teacher(run):
    kept = merge(GIVEN, {"teacher": {"offload": True}})
    assert_same_losses(run("offloaded", kept), run("plain", GIVEN))


BF16 = {"train": {"precision": "bf16"}}


@pytest.mark.parametrize(
    ("needs", "sections"),
    [
        (None, {"rollout": {"engine": "continuous"}}),
        (None, {"rollout": {"group_size": 4}, "train": {"micro_batch_tokens": 200}}),
        (None, {"method": "grpo", "rollout": {"group_size": 4}, "loss": {"kl": 0.1}}),
        (None, {"teacher": {"quantize": "int8"}}),
        ("bitsandbytes", {"train": {"optimizer": "adamw_bnb_8bit"}}),
        ("bitsandbytes", {"model": {"lora": {"rank": 4, "alpha": 8, "quantize": "nf4"}}}),
        ("vllm", {"rollout": {"engine": "vllm", "gpu_memory": 0.2}}),
    ],
    ids=["continuous", "split groups", "grpo", "int8", "adam in 8 bits", "qlora", "vllm"],
)
def test_what_a_gpu_is_for_trains(needs, sections, run):
    if needs is not None and importlib.util.find_spec(needs) is None:
        pytest.skip(f"needs {needs}")
    lines = run("run", merge(BF16, sections))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["loss"] is not None and line["student_entropy"] > 0 for line in lines)
    if needs == "vllm":  # the weights there are the student's
        assert all(abs(line["engine_divergence"]) < 0.1 for line in lines)


@pytest.mark.parametrize("sharding", ["none", "fsdp2", "zero2", "zero3"])
def test_two_gpus_train_as_one(sharding, run):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    split = merge(GIVEN, {"train": {"sharding": sharding}})
    assert_same_losses(run("two", split, processes=2), run("one", GIVEN))
