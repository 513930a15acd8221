"""Training runs: their files, resuming, micro-batches, teachers."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers.lines import read_lines
from helpers.tiny_models import tiny_model
from helpers.training_cases import (
    quiet,
    short_config,
    timeless,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd.grading.grader import Grade
from opsd.grading.reward_functions import by_row
from opsd.models.load import load_model
from opsd.objectives import OPSD, Sample, SampleGroup, samples_of
from opsd.quickstart import tiny_model as tiny
from opsd.runs.directory import claim_directory
from opsd.runs.log import FILES
from opsd.training.load_data import load_data
from opsd.training.micro_batches import packed_batches, padded_batches, stream_tokens
from opsd.training.run import run as run_training
from opsd.training.run import train
from opsd.training.trainer import TrainingLoop

METRICS = {
    "step",
    "generated_tokens",
    "trained_tokens",
    "loss",
    "divergence",
    "student_entropy",
    "rollout_length",
    "seconds",
}
EVALUATION = {"step", "generated_tokens", "trained_tokens", "role", "accuracy", "low", "high"} | {
    "problems",
    "samples",
    "mean_length",
    "truncated_fraction",
    "seconds",
}


class NobodyIsRight:
    def grade(self, completions, answers):
        return [Grade(False, "no", None) for _ in completions]


def digits(completion: str, row: dict) -> float:
    """A reward that differs between random rollouts."""
    return float(sum(character.isdigit() for character in completion))


def execute(config, **more):
    """`opsd.training.run.run` with a reward of its own, as the quickstart calls it."""
    directory = Path(config.output.dir)
    if not more.get("checkpoint"):
        claim_directory(directory, config, resume=False)
    rows, held_out = load_data(config)
    model, tokenizer = load_model(config.model)
    torch.manual_seed(config.train.seed)
    run_training(
        config,
        model,
        tokenizer,
        rows,
        held_out,
        NobodyIsRight(),
        quiet(),
        verifier=by_row("digits", digits),
        **more,
    )
    return directory


@pytest.mark.parametrize("method", ["opsd", "sft"])
def test_a_run_writes_all_its_files(method, files, tmp_path):
    config = short_config(*files, tmp_path / "run", method=method, eval={"teacher": True})
    directory = train(config, quiet())
    check_directory(directory, method)
    roles = [(e["step"], e["role"]) for e in read_lines(directory / "evaluations.jsonl")]
    assert roles == [(0, "student"), (0, "teacher"), (2, "student"), (4, "student")]
    for name in ("report.html", "curves.png"):
        assert (directory / name).stat().st_size > 1000
    base = load_file(files[0] / "model.safetensors")
    trained = load_file(directory / "model" / "model.safetensors")
    assert any(not torch.equal(base[name], trained[name]) for name in base)


def test_grpo_trains_on_a_reward(files, tmp_path):
    config = short_config(*files, tmp_path / "run", method="grpo", rollout={"group_size": 4})
    directory = execute(config)
    check_directory(directory, "grpo")
    lines = read_lines(directory / "metrics.jsonl")
    assert all(line["informative_groups"] > 0 and line["reward"] > 0 for line in lines)
    assert all(line["grad_norm"] > 0 for line in lines)


def test_rollouts_of_each_step_are_kept_with_how_they_were_drawn(files, tmp_path):
    sampling = {"max_new_tokens": 6, "temperature": 0.9, "top_p": 0.8, "top_k": 7, "batch_size": 2}
    config = short_config(
        *files,
        tmp_path / "run",
        method="grpo",
        rollout={"group_size": 4, **sampling},
        output={"rollouts": 5},
    )
    lines = read_lines(execute(config) / "rollouts.jsonl")
    assert [line["step"] for line in lines] == [1] * 5 + [2] * 5 + [3] * 5 + [4] * 5
    assert [line["problem"] == lines[0]["problem"] for line in lines[:5]] == [True] * 4 + [False]
    how = {"source": "student", "engine": "generate", **sampling, "seed": None}
    for line in lines:
        assert line["sampling"] == how
        assert line["reward"] == digits(line["completion"], "") and isinstance(
            line["correct"], bool
        )
        assert line["length"] == 6 or line["finished"]


def test_rollouts_may_not_be_kept_and_given_text_is_none(files, tmp_path):
    for name, changed in (
        ("none", {"output": {"rollouts": 0, "dir": str(tmp_path / "none")}}),
        ("sft", {"method": "sft"}),
        ("reference", {"rollout": {"source": "reference"}}),
    ):
        few = {"train": {"steps": 1, "save_every": 0}, "eval": {"problems": 0}}
        execute(short_config(*files, tmp_path / name, **few, **changed))
        assert not (tmp_path / name / "rollouts.jsonl").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_continuous_engine_trains_too(precision, files, tmp_path):
    config = short_config(
        *files,
        tmp_path / "run",
        rollout={"engine": "continuous", "batch_size": 2},
        train={"precision": precision},
    )
    check_directory(execute(config), "opsd")


def check_directory(directory, method):
    lines = read_lines(directory / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert set(line) >= METRICS
        assert math.isfinite(line["loss"]) and line["student_entropy"] > 0
        assert (line["divergence"] is None) == (method != "opsd")
    for name in ("trained_tokens", "seconds"):
        counts = [line[name] for line in lines]
        assert counts[0] > 0 and counts == sorted(set(counts))
    generated = lines[-1]["generated_tokens"]
    assert generated == 0 if method == "sft" else 0 < generated <= 4 * 3 * 4 * 6
    if method == "opsd":
        assert generated == lines[-1]["trained_tokens"]
        assert all(math.isclose(line["loss"], line["divergence"], rel_tol=1e-4) for line in lines)
    evaluations = read_lines(directory / "evaluations.jsonl")
    assert all(set(line) == EVALUATION and line["problems"] == 4 for line in evaluations)
    assert evaluations[-1]["trained_tokens"] == lines[-1]["trained_tokens"]
    samples = read_lines(directory / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [0, 0, 2, 2, 4, 4]
    assert samples[0]["problem"] == samples[2]["problem"] == samples[4]["problem"]
    token = samples[0]["tokens"][0]
    assert token["divergence"] >= 0 and 0 < token["student_probability"] <= 1
    assert len(token["teacher"]) == 3
    summary = json.loads((directory / "summary.json").read_text())
    assert set(summary) == {"method", "model", "accuracy", "generated_tokens", "trained_tokens"} | {
        "best",
        "seconds",
        "peak_memory_bytes",
        "versions",
        "machine",
    }
    assert summary["method"] == method and summary["accuracy"] == {"before": 0.0, "after": 0.0}
    assert summary["generated_tokens"] == generated
    assert sorted(path.name for path in directory.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Q:1+1"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > ids["input_ids"].shape[1]


@pytest.mark.parametrize("method", ["opsd", "grpo", "sft"])
def test_resuming_changes_nothing(method, files, tmp_path):
    """Bit for bit, and without duplicate lines, whatever the interrupted run had left."""
    rollout = {"group_size": 4 if method == "grpo" else 1}
    config = short_config(*files, tmp_path / "run", method=method, rollout=rollout)
    directory = execute(config)
    whole = tmp_path / "whole"
    shutil.copytree(directory, whole)
    for name in ("checkpoint-4", "model"):
        shutil.rmtree(directory / name)
    (directory / "summary.json").unlink()
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "gener')  # killed while writing
    half = directory / ".checkpoint-3-killed.part"
    half.mkdir()
    (half / "model.safetensors").touch()  # killed while saving
    checkpoint = claim_directory(directory, config, resume=True)
    assert checkpoint == directory / "checkpoint-2"
    execute(config, checkpoint=checkpoint)
    for name in FILES:
        a, b = (timeless(read_lines(place / name)) for place in (whole, directory))
        assert a == b, name
    a, b = (load_file(place / "model" / "model.safetensors") for place in (whole, directory))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("train", "steps"),
    [
        ({"steps": 4}, [0, 2, 4]),  # an epoch
        ({"steps": 3, "save_every": 3}, [0, 2, 3]),  # a part of one, which Trainer would go on with
        ({"steps": 4, "save_every": 1, "token_budget": 150}, [0, 2]),
    ],
)
def test_a_finished_run_can_be_resumed_without_harm(train, steps, files, tmp_path):
    config = short_config(*files, tmp_path / "run", method="sft", train=train)
    directory = execute(config)
    before = (
        (directory / "metrics.jsonl").read_text(),
        load_file(directory / "model" / "model.safetensors"),
    )
    execute(config, checkpoint=claim_directory(directory, config, resume=True))
    assert (directory / "metrics.jsonl").read_text() == before[0]
    after = load_file(directory / "model" / "model.safetensors")
    assert all(torch.equal(after[name], before[1][name]) for name in after)
    assert [e["step"] for e in read_lines(directory / "evaluations.jsonl")] == steps


def test_a_run_that_goes_on_is_not_finished(files, tmp_path, monkeypatch):
    directory = execute(short_config(*files, tmp_path / "run", method="sft"))
    more = short_config(*files, tmp_path / "run", method="sft", train={"token_budget": 10**6})
    checkpoint = claim_directory(directory, more, resume=True)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingLoop, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute(more, checkpoint=checkpoint)
    assert not (directory / "summary.json").exists()


@pytest.fixture
def steps_seen(monkeypatch):
    """Each step's gradient, flat, and the trainer that made it."""
    seen = []
    original = TrainingLoop.training_step

    def spy(self, *arguments, **more):
        loss = original(self, *arguments, **more)
        gradient = torch.cat([p.grad.flatten() for p in self.model.parameters()]).clone()
        seen.append((self, float(loss), gradient))
        return loss

    monkeypatch.setattr(TrainingLoop, "training_step", spy)
    return seen


WAYS = [
    {"micro_batch_tokens": 1},
    {"micro_batch_tokens": 90},
    {"micro_batch_tokens": 100_000},
    {"micro_batch_tokens": 90, "share_prefixes": False},
]


def check_one_step(files, directory, method, ways, steps_seen):
    """It is the same in all these ways."""
    for number, way in enumerate(ways):
        config = short_config(
            *files,
            directory / str(number),
            method=method,
            rollout={"group_size": 1 if method == "sft" else 4},
            train={"steps": 1, "save_every": 0, **way},
            eval={"problems": 0},
        )
        execute(config, save=False)
    _, loss, gradient = steps_seen[0]
    assert gradient.norm() > 1e-3
    for _, other_loss, other in steps_seen[1:]:
        assert math.isclose(loss, other_loss, rel_tol=1e-5, abs_tol=1e-6)
        assert (gradient - other).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("method", ["opsd", "grpo", "sft"])
def test_micro_batches_do_not_change_the_step(method, files, tmp_path, steps_seen):
    check_one_step(files, tmp_path, method, WAYS, steps_seen)


@pytest.mark.parametrize("method", ["opsd", "grpo"])
def test_nor_do_those_of_a_model_that_carries_states(method, files, tmp_path, steps_seen):
    tokenizer = tiny.make_tokenizer()
    model = tiny_model("qwen3_5_text", vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=0)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "hybrid")
    ways = [*WAYS, {"micro_batch_tokens": 90, "gradient_checkpointing": True}]
    check_one_step((tmp_path / "hybrid", files[1]), tmp_path, method, ways, steps_seen)
    alone = [loop.micro_step.alone for loop, *_ in steps_seen]
    assert alone == [False, False, False, False, True]


def test_padded_batches_stay_within_the_budget_and_lose_nothing():
    lengths = (5, 4, 9, 6, 6, 14, 7)
    groups = [SampleGroup([1], [Sample([2] * (n - 3), 1.0)], [[1, 1, 1]]) for n in lengths]
    batches = padded_batches(groups, 20)
    assert sorted(g.longest() for batch in batches for g in batch) == [4, 5, 6, 6, 7, 9, 14]
    for batch in batches:
        assert max(group.longest() for group in batch) * len(batch) <= 20
    assert len(batches) < len(lengths)


def test_packed_batches_stay_within_the_budget_and_keep_contexts_together():
    groups = [
        SampleGroup([n] * 5, [Sample([2] * r, 1.0) for r in lengths])
        for n, lengths in enumerate(GROUPS)
    ]
    batches = packed_batches(groups, 20)
    samples = [id(s) for batch in batches for s in samples_of(batch)]
    assert sorted(samples) == sorted(map(id, samples_of(groups)))
    for batch in batches:
        assert max(stream_tokens(batch)) <= 20 or len(samples_of(batch)) == 1
    homes = [sum(g.student is own.student for b in batches for own in b) for g in groups]
    assert homes == [1, 1, 2, 1]
    assert len(batches) == 4


GROUPS = ((1, 1, 3), (4, 2), (9, 9, 3), (40,))
"""Rollout lengths: of 5 + Σ (R - 1) tokens only the third is too long for 20, in two parts."""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("policy", ["live", "initial"])
def test_the_teachers_weights(policy, precision, files, tmp_path, steps_seen):
    config = short_config(
        *files,
        tmp_path / "run",
        teacher={"policy": policy},
        train={"steps": 2, "save_every": 0, "precision": precision},
        eval={"problems": 0},
    )
    before = load_file(files[0] / "model.safetensors")
    steps = []

    def spy_on_loss(original):
        def loss(self, model, groups, totals, share):
            wanted = dict(model.named_parameters()) if policy == "live" else before
            pairs = [(p, wanted[name]) for name, p in self.teacher.named_parameters()]
            steps.append(all(torch.equal(p, w.to(p.dtype)) for p, w in pairs))
            return original(self, model, groups, totals, share)

        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OPSD, "loss", spy_on_loss(OPSD.loss))
        directory = execute(config)
    assert steps == [True, True]
    trained = load_file(directory / "model" / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in trained.values())
    assert any(not torch.equal(trained[name], before[name]) for name in before)


@pytest.mark.parametrize("clip", ["none", "entry", "token"])
def test_clips_are_logged(clip, files, tmp_path):
    config = short_config(
        *files,
        tmp_path / "run",
        loss={"clip": clip, **({} if clip == "none" else {"clip_threshold": 1e-3})},
        train={"steps": 1, "save_every": 0},
        eval={"problems": 0},
    )
    (line,) = read_lines(execute(config, save=False) / "metrics.jsonl")
    if clip == "none":
        assert "clipped_fraction" not in line and "inverted_gradient_fraction" not in line
    else:
        assert 0 < line["clipped_fraction"] <= 1 and 0 <= line["inverted_gradient_fraction"] <= 1
        assert line["loss"] < line["divergence"]
    if clip == "token":
        assert line["loss"] <= 1e-3 * 1.001


def test_the_token_budget_ends_a_run(files, tmp_path):
    config = short_config(*files, tmp_path / "run", train={"save_every": 0, "token_budget": 12})
    directory = execute(config)
    generated = [line["generated_tokens"] for line in read_lines(directory / "metrics.jsonl")]
    assert len(generated) < 4 and generated[-1] >= 12 and all(n < 12 for n in generated[:-1])
    evaluations = read_lines(directory / "evaluations.jsonl")
    assert evaluations[-1]["generated_tokens"] == generated[-1]


def test_a_step_without_any_signal_changes_nothing(files, tmp_path):
    """All rewards alike, as when no answer is right: grpo has nothing to learn and goes on."""
    config = short_config(
        *files,
        tmp_path / "run",
        method="grpo",
        rollout={"group_size": 2},
        train={"steps": 2, "save_every": 0},
        eval={"problems": 4},
    )
    directory = train(config, quiet())
    lines = read_lines(directory / "metrics.jsonl")
    assert len(lines) == 2 and all(line["loss"] == 0 for line in lines)
    base = load_file(files[0] / "model.safetensors")
    trained = load_file(directory / "model" / "model.safetensors")
    assert all(torch.equal(base[name], trained[name]) for name in trained)
