"""`python -m benchmarks.step`: measures a training step with and without shared prefixes.

It is one step of OPSD: the teacher's stream without gradient, the student's forward, the fused loss
and backward, for problems with G rollouts of R tokens after contexts of P (student) and P'
(teacher) tokens. `benchmarks.step_ways` has the ways that are compared. First all must agree in the
gradient; then they run in turn; memory is measured in separate steps. Last comes one whole step,
with rollouts and optimizer, by its parts, and the operators that take most of it.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from opsd.common.step_timer import StepTimer, measured, phase
from opsd.config.sections import ModelSection
from opsd.models.copies import copy_model
from opsd.models.load import load_model
from opsd.objectives import Sample, SampleGroup, samples_of
from opsd.rollout import GenerateSampler, Sampling
from opsd.training.micro_batches import separate_tokens, stream_tokens
from opsd.training.step import token_ratio

from . import machine
from .measure import Disagreement, interleaved, peak_bytes
from .step_ways import Setting, Step, ways


@dataclass(frozen=True)
class Case:
    """Problems, rollouts for each, and tokens: student's context, teacher's context, rollout."""

    problems: int
    rollouts: int
    student: int
    teacher: int
    length: int

    def __str__(self) -> str:
        return ",".join(map(str, asdict(self).values()))

    def groups(self, vocabulary: int) -> list[SampleGroup]:
        """Random tokens; rollouts have 3/4 R to R tokens."""
        draw = torch.Generator().manual_seed(0)

        def ids(n: int) -> list[int]:
            return torch.randint(vocabulary, (n,), generator=draw).tolist()

        groups = []
        for _ in range(self.problems):
            student, teacher = ids(self.student), ids(self.teacher)
            lengths = [
                self.length - index * self.length // (4 * self.rollouts)
                for index in range(self.rollouts)
            ]
            groups.append(SampleGroup(student, [Sample(ids(n), 1e-3) for n in lengths], [teacher]))
        return groups


EXAMPLE = Case(1, 8, 200, 1000, 256)
CASES = [
    EXAMPLE,
    # eight rollouts in groups of 4, 2 and 1
    Case(2, 4, 200, 1000, 256),
    Case(4, 2, 200, 1000, 256),
    Case(8, 1, 200, 1000, 256),
    # contexts and rollouts, shorter and longer
    Case(1, 8, 200, 250, 256),
    Case(1, 8, 200, 2000, 256),
    Case(1, 8, 50, 1000, 256),
    Case(1, 8, 800, 1000, 256),
    Case(1, 8, 200, 1000, 64),
    Case(1, 8, 200, 1000, 512),
]
GPU_CASES = [
    Case(1, 8, 200, 5000, 1024),
    # 32 rollouts
    Case(4, 8, 200, 1000, 1024),
    Case(32, 1, 200, 1000, 1024),
]
WORK = (3, 1)
"""A token's products: (the student's forward and backward, the teacher's forward)."""

CHECKED = 1 << 16
"""The number of entries that are compared of each parameter's gradient."""


def some_gradient(model: PreTrainedModel) -> Tensor:
    gradients = (p.grad.flatten()[:CHECKED] for p in model.parameters() if p.grad is not None)
    return torch.cat([g.float().cpu() for g in gradients])


def work_ratio(groups: list[SampleGroup]) -> float:
    """Products with each rollout run alone ÷ with shared contexts, without attention's and the
    head's.
    """
    shared, alone = stream_tokens(groups), separate_tokens(groups)
    return sum(w * n for w, n in zip(WORK, alone, strict=True)) / sum(
        w * n for w, n in zip(WORK, shared, strict=True)
    )


def measure(case: Case, setting: Setting, rounds: int, seconds: float) -> dict:
    """Measure one row of the report, JSON-ready."""
    groups = case.groups(setting.model.config.vocab_size)
    row: dict[str, Any] = {"case": asdict(case), "token_ratio": token_ratio(groups)}
    row |= {"work_ratio": work_ratio(groups), "errors": {}, "failed": {}}
    row["tokens"] = sum(sample.tokens for sample in samples_of(groups))
    kept: dict[str, Step] = {}
    gradients: dict[str, Tensor] = {}
    device = setting.model.device.type
    for name, step in ways(setting).items():  # a warm-up as well
        try:
            step(groups)
        except torch.OutOfMemoryError as error:
            row["failed"][name] = str(error).splitlines()[0]
            torch.cuda.empty_cache()
            continue
        gradients[name], kept[name] = some_gradient(setting.model), step
    wanted = gradients["naive"]
    for name, found in gradients.items():
        apart = row["errors"][name] = float((found - wanted).norm() / wanted.norm())
        if not apart < (5e-2 if setting.bf16 else 1e-4):
            raise Disagreement(f"{name} and naive differ by {apart:.1e} in the gradient")
    calls: dict[str, Callable[[], object]] = {n: partial(f, groups) for n, f in kept.items()}
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    row |= interleaved(calls, rounds, synchronize, seconds)
    row["peak_bytes"] = {name: peak_bytes(call, device) for name, call in calls.items()}
    return row


def whole_step(case: Case, setting: Setting) -> dict:
    """Seconds and peak bytes of a step's parts, and the shares of its largest operators.

    Rollouts are sampled from the teacher's copy, which has the student's weights, and have the
    greatest length; the step trains on the case's own.
    """
    model, device = setting.model, setting.model.device
    groups = case.groups(model.config.vocab_size)
    name, step = next(iter(ways(setting).items()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    sampler = GenerateSampler(setting.teacher, frozenset([model.config.vocab_size]))
    parts, found = StepTimer(device), {}
    for _ in range(2):  # the first warms up
        with measured(parts):
            with phase("rollout"):
                contexts = [group.student for group in groups for _ in group.samples]
                sampler.sample(contexts, Sampling(case.length, batch_size=64))
            step(groups)
            with phase("optimizer"):
                optimizer.step()
        found = parts.take()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step(groups)
    return {"case": asdict(case), "way": name, "parts": found, "operators": operators(profile)}


def operators(profile) -> list[dict]:
    """The ten operators with the most time of their own, and their shares of the total."""
    averages = profile.key_averages()
    on_gpu = any(event.self_device_time_total for event in averages)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    total = sum(getattr(event, key) for event in averages)
    largest = sorted(averages, key=lambda event: -getattr(event, key))[:10]
    return [
        {"name": event.key, "calls": event.count, "share": getattr(event, key) / total}
        for event in largest
    ]


def tiny() -> PreTrainedModel:
    """Four layers, D = 256, 8 heads over 4, V = 4096, random weights, fp32."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=8192,
        )
    )


def qwen3_1_7b() -> PreTrainedModel:
    """A model of Qwen3-1.7B's shape, random weights, fp32, on the GPU."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
    )
    with torch.device("cuda"):
        return Qwen3ForCausalLM(config)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="Qwen3-1.7B's shape in bf16, on a GPU")
    parser.add_argument("--model", help="a model's directory instead of four random layers")
    parser.add_argument("--case", metavar="N,G,P,P',R", help="problems and lengths (see above)")
    parser.add_argument("--bf16", action="store_true", help="autocast to bf16")
    parser.add_argument("--checkpointing", action="store_true", help="of activations")
    parser.add_argument("--compile", action="store_true", help="also under torch.compile")
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20, help="of a case, then no new round")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks-step.json"))
    options = parser.parse_args()
    if options.gpu and not torch.cuda.is_available():
        print("--gpu: there is no GPU", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    setting, cases = prepare(options)
    report: dict[str, Any] = {"machine": machine.describe(), "options": vars(options)}
    report |= {"refused": [], "rows": []}
    for case in cases:
        try:
            row = measure(case, setting, options.rounds, options.seconds)
        except Disagreement as error:
            report["refused"].append(f"{case}: {error}")
            print(f"{case}: refused: {error}")
            continue
        report["rows"].append(row)
        show(case, row, "seconds" if options.gpu else "cpu_seconds")
    report["step"] = whole_step(cases[0], setting)
    show_step(report["step"])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1, default=str) + "\n")
    print(f"written: {options.output}")
    return 1 if report["refused"] else 0


def prepare(options: argparse.Namespace) -> tuple[Setting, list[Case]]:
    """Make the models and the cases that were asked for."""
    bf16 = options.bf16 or options.gpu
    if options.gpu:
        model, cases = qwen3_1_7b(), GPU_CASES
    else:
        model, cases = tiny(), CASES
    if options.model:
        model = load_model(ModelSection(path=options.model), str(model.device))[0]
    if options.case:
        cases = [Case(*map(int, options.case.split(",")))]
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    teacher = copy_model(model, torch.bfloat16 if bf16 else torch.float32)
    setting = Setting(
        model.train(), teacher, bf16, options.micro_batch_tokens, compiled=options.compile
    )
    return setting, cases


def show(case: Case, row: dict, clock: str) -> None:
    """Print a case's lines: each way's time, tokens a second and memory; then the ratios."""
    first = next(iter(row[clock]))
    print(
        f"{case}: {row['token_ratio']:.2f} times fewer tokens, {row['work_ratio']:.2f} times fewer "
        f"products ({clock}, minimum)"
    )
    for name, times in row[clock].items():
        seconds, peak = times["min"], row["peak_bytes"][name]
        memory = "-" if peak is None else f"{peak / 2**20:.0f} MiB"
        ratio = seconds / row[clock][first]["min"]
        print(
            f"  {name:20}{seconds:8.2f}s x{ratio:<6.2f}{row['tokens'] / seconds:8.0f} tokens/s"
            f"{memory:>12}",
            flush=True,
        )
    for name, reason in row["failed"].items():
        print(f"  {name:20}failed: {reason}", flush=True)


def show_step(step: dict) -> None:
    """Print the table of parts, and the largest operators."""
    print(f"one whole step, {step['way']}, {','.join(map(str, step['case'].values()))}:")
    seconds = {k: v for k, v in step["parts"].items() if k.endswith("_seconds")}
    for key, value in seconds.items():
        name = key.removesuffix("_seconds")
        peak = step["parts"].get(f"{name}_peak_bytes")
        memory = "" if peak is None else f"{peak / 2**20:.0f} MiB held"
        print(f"  {name:12}{value:8.2f}s {value / sum(seconds.values()):5.0%}  {memory}")
    for operator in step["operators"][:5]:
        print(f"  {operator['share']:5.0%} {operator['name'][:60]} ({operator['calls']} calls)")


if __name__ == "__main__":
    sys.exit(main())
