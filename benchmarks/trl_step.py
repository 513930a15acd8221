"""`python -m benchmarks.trl_step`: measures whole training steps of ours and of TRL's SDFTTrainer
over full logits.

Both trainers use the same small model, rows and rollouts. The rollouts are given; a step goes from
them to the optimizer's update, with everything that each trainer does between (TRL scores its
rollouts once more, for importance ratios). Forward KL to the weights of step 0, the mean over
rollouts, AdamW. Each trains in a process of its own, in turn. The losses of all steps must agree
before a figure is written; later ones do only if the updates are the same. Seconds are of the steps
after the first; memory is the peak that a step adds, and the whole peak.

`--gpu`: Qwen3-1.7B's shape in bf16, 32 rollouts of up to 1024 tokens, on a GPU.
"""

import argparse
import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)

from . import machine

AGREEMENT = {False: 1e-3, True: 5e-2}
"""The largest relative difference of the trainers' losses: in fp32, in bf16 on a GPU."""

TEMPLATE = "{{ problem }}\n{{ solution }}"


@dataclass(frozen=True)
class Case:
    """Problems and rollouts in a step, their tokens, and the model's size."""

    problems: int = 2
    rollouts: int = 8
    problem: int = 60
    solution: int = 600
    length: int = 128
    steps: int = 4
    vocabulary: int = 32768
    width: int = 256
    layers: int = 6
    heads: int = 4
    batch: int = 8  # sequences in TRL's forward; its default
    gpu: int = 0  # 1: run on a GPU, in bf16


ON_GPU = Case(
    problems=4,
    problem=200,
    solution=1800,
    length=1024,
    steps=3,
    vocabulary=151936,
    width=2048,
    layers=28,
    heads=16,
    gpu=1,
)
"""Qwen3-1.7B's shape."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl_step", description=__doc__)
    parser.add_argument("--gpu", action="store_const", const=1, help="Qwen3-1.7B's shape, on a GPU")
    for name in asdict(Case()).keys() - {"gpu"}:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each trainer")
    parser.add_argument("--output", type=Path, help="write the JSON there, too")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.gpu and not torch.cuda.is_available():
        print("--gpu: there is no GPU", file=sys.stderr)
        return 1
    asked = {name: getattr(parsed, name) for name in asdict(Case())}
    case = replace(ON_GPU if parsed.gpu else Case(), **{k: v for k, v in asked.items() if v})
    if parsed.worker:
        way, directory = parsed.worker
        print(json.dumps({"trl": by_trl, "opsd": by_opsd}[way](case, Path(directory))))
        return 0
    report = compare(case, parsed.rounds)
    text = json.dumps(report, indent=2)
    if parsed.output:
        parsed.output.write_text(text + "\n")
    print(text)
    return 0


def compare(case: Case, rounds: int) -> dict:
    """The report, JSON-ready. Raises SystemExit if the trainers' losses differ."""
    runs: dict[str, list[dict]] = {"trl": [], "opsd": []}
    with tempfile.TemporaryDirectory() as directory:
        write_inputs(case, Path(directory))
        for _ in range(rounds):
            for way, found in runs.items():
                found.append(_worker(case, way, directory))
    theirs, ours = (torch.tensor(found[0]["losses"]) for found in runs.values())
    difference = float(((ours - theirs).abs() / theirs.abs()).max())
    if not difference <= AGREEMENT[bool(case.gpu)]:
        raise SystemExit(f"the losses differ by {difference:.1e}: {theirs} (TRL), {ours} (OPSD)")
    return {
        "case": asdict(case),
        "machine": machine.describe(),
        "losses": {way: found[0]["losses"] for way, found in runs.items()},
        "largest_difference": difference,
        **{way: _summary(found) for way, found in runs.items()},
        "times_faster": _ratio(runs, "seconds"),
        "times_fewer_processor_seconds": _ratio(runs, "processor_seconds"),
        "times_less_memory": _ratio(runs, "peak_bytes"),
        "times_less_memory_in_all": _ratio(runs, "whole_peak_bytes"),
    }


def _worker(case: Case, way: str, directory: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.trl_step", "--worker", way, directory]
    sizes = {name: n for name, n in asdict(case).items() if name != "gpu"}
    command += [word for name, n in sizes.items() for word in (f"--{name}", str(n))]
    command += ["--gpu"] if case.gpu else []
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **QUIET})
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


QUIET = {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}


MEASURED = ("seconds", "processor_seconds", "peak_bytes", "whole_peak_bytes")


def _summary(runs: list[dict]) -> dict:
    return {
        name: statistics.median(value for run in runs for value in run[name]) for name in MEASURED
    }


def _ratio(runs: dict[str, list[dict]], name: str) -> float:
    return _summary(runs["trl"])[name] / _summary(runs["opsd"])[name]


# --- inputs -------------------------------------------------------------------------------------


def write_inputs(case: Case, directory: Path) -> None:
    """Write a random model, with a head far wider than its tokenizer, rows, and each step's
    rollouts.
    """
    from opsd.quickstart import tiny_model as tiny

    tokenizer, draw = tiny.make_tokenizer(), random.Random(0)
    config = Qwen3Config(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        intermediate_size=3 * case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads // 2,
        head_dim=case.width // case.heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        initializer_range=0.05,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")

    def digits(n: int) -> str:
        return "".join(draw.choice("0123456789") for _ in range(n))

    rows = [
        {"problem": digits(case.problem), "solution": digits(case.solution), "answer": "0"}
        for _ in range(case.problems)
    ]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Use ids of digits and signs, none of which ends a rollout; 3/4 to all of the length.
    known = sorted(tokenizer.get_vocab().values())[5:]
    rollouts = [
        {
            row["problem"]: [
                [draw.choice(known) for _ in range(case.length - i * case.length // 32)]
                for i in range(case.rollouts)
            ]
            for row in rows
        }
        for _ in range(case.steps)
    ]
    (directory / "rollouts.json").write_text(json.dumps(rollouts))


class Replay:
    """Returns given rollouts: for each context the next one of the problem in it."""

    def __init__(self, directory: Path, tokenizer):
        self.steps = iter(json.loads((directory / "rollouts.json").read_text()))
        self.tokenizer = tokenizer

    def __call__(self, contexts) -> list[list[int]]:
        """A step's rollouts, one for each context."""
        left = {problem: list(ids) for problem, ids in next(self.steps).items()}
        texts = self.tokenizer.batch_decode(contexts)
        return [next(ids for p, ids in left.items() if p in text).pop(0) for text in texts]


class Meter(TrainerCallback):
    """Measures seconds and memory of each step but the first, up to the optimizer's update."""

    def __init__(self, gpu: bool):
        self.gpu = gpu
        self.found: dict[str, list[float]] = {name: [] for name in MEASURED}

    def on_step_begin(self, args, state, control, **_) -> None:
        if self.gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status("VmRSS")
        self._begun = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **_) -> None:
        if self.gpu:
            torch.cuda.synchronize()
        if state.global_step == 1:
            return  # the first step is a warm-up
        peak = torch.cuda.max_memory_allocated() if self.gpu else _status("VmHWM")
        seconds, processor = time.perf_counter(), time.process_time()
        values = (seconds - self._begun[0], processor - self._begun[1], peak - self._before, peak)
        for name, value in zip(MEASURED, values, strict=True):
            self.found[name].append(value)

    def record(self, losses: list[float]) -> dict:
        """The record that the worker prints."""
        return {"losses": losses, **self.found}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


# --- the two trainers ---------------------------------------------------------------------------

LEARNING_RATE = 1e-4


def by_trl(case: Case, directory: Path) -> dict:
    """Train with TRL's SDFTTrainer on the given rollouts."""
    from datasets import Dataset
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    replay = Replay(directory, tokenizer)

    class Given(SDFTTrainer):
        def _generate(self, prompt_ids):
            return prompt_ids, replay(prompt_ids)

    rows = [json.loads(line) for line in (directory / "rows.jsonl").read_text().splitlines()]
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["problem"]}],
                "privileged_context": row["solution"],
            }
            for row in rows
        ]
    )
    sequences = case.problems * case.rollouts
    meter = Meter(bool(case.gpu))
    trainer = Given(
        model=model,
        args=SDFTConfig(
            output_dir=str(directory / "trl"),
            max_steps=case.steps,
            per_device_train_batch_size=case.batch,
            gradient_accumulation_steps=sequences // case.batch,
            num_generations=case.rollouts,
            max_completion_length=case.length,
            max_prompt_length=None,
            distillation_mode="full_logits",
            distillation_alpha=0.0,
            teacher_model_kind="base",
            teacher_prompt_template="{prompt}\n{privileged_context}",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=not case.gpu,
            bf16=bool(case.gpu),
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[meter],
    )
    trainer.train()
    return meter.record([e["loss"] for e in trainer.state.log_history if "loss" in e])


def by_opsd(case: Case, directory: Path) -> dict:
    """Train with our trainer on the given rollouts."""
    from opsd.common.precision import compute_dtype
    from opsd.config.load import parse_config
    from opsd.data.prompts import Prompts
    from opsd.data.rows import load_rows
    from opsd.models.load import load_model
    from opsd.models.teacher import make_teacher
    from opsd.objectives import make_objective
    from opsd.rollout import Rollout, Sampling
    from opsd.runs.log import RunLog
    from opsd.training.trainer import TrainingLoop

    run = directory / "opsd"
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").unlink(missing_ok=True)
    config = parse_config(
        {
            "model": {"path": str(directory / "model")},
            "data": {"source": str(directory / "rows.jsonl")},
            "prompts": {"student": "{{ problem }}", "teacher": TEMPLATE},
            "rollout": {"group_size": case.rollouts, "max_new_tokens": case.length},
            "loss": {"aggregation": "rollout"},
            "train": {
                "steps": case.steps,
                "problems_per_step": case.problems,
                "learning_rate": LEARNING_RATE,
                "precision": "bf16" if case.gpu else "fp32",
            },
            "eval": {"problems": 0},
            "output": {"dir": str(run)},
        }
    )
    model, tokenizer = load_model(config.model, "cuda" if case.gpu else "cpu")
    prompts, replay, meter = (
        Prompts(config.prompts, tokenizer),
        Replay(directory, tokenizer),
        Meter(bool(case.gpu)),
    )

    class Given:
        engine = "given"

        def sync_weights(self, model) -> None:
            """The rollouts are given, whatever the weights."""

        def sample(self, contexts, sampling, progress=None) -> list[Rollout]:
            return [Rollout(ids, False) for ids in replay(contexts)]

    teacher, _ = make_teacher(
        config.teacher, config.model, compute_dtype(config.train.precision), model, tokenizer, model
    )
    trainer = TrainingLoop(
        config,
        model,
        load_rows(str(config.data.source)),
        prompts,
        make_objective(config.method, config.loss, teacher, prompts, Sampling.of(config.rollout)),
        Given(),
        RunLog(run),
    )
    trainer.callback_handler.add_callback(meter)
    trainer.train()
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return meter.record([json.loads(line)["loss"] for line in lines])


if __name__ == "__main__":
    sys.exit(main())
