"""`opsd eval`: a model, a benchmark, a table."""

import argparse
from pathlib import Path

import torch

from opsd.config import ModelSection, PromptsSection
from opsd.display import Display
from opsd.environment import machine, versions
from opsd.errors import UserError
from opsd.evaluate.benchmarks import load_benchmark
from opsd.evaluate.grading import Grader
from opsd.evaluate.metrics import average_at_k, mean_pass_at_k
from opsd.evaluate.run import decode
from opsd.models import load_model, stop_ids, window
from opsd.prompts import Prompts
from opsd.rollout import GenerateSampler, Sampling


def evaluate_command(parsed: argparse.Namespace) -> None:
    """Sample K answers a problem, grade them, show avg@K and pass@K."""
    for name in ("samples", "problems", "max_new_tokens"):
        value = getattr(parsed, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    if parsed.temperature is not None and parsed.temperature < 0:
        raise UserError(f"--temperature is {parsed.temperature}: it must be at least 0")
    display = Display()
    benchmark = load_benchmark(parsed.benchmark, limit=parsed.problems, seed=parsed.seed)
    convention = benchmark.convention
    samples = parsed.samples or convention.samples
    temperature = convention.temperature if parsed.temperature is None else parsed.temperature
    if temperature == 0 and samples > 1:
        raise UserError(f"--samples is {samples}: greedy answers are all alike; set --temperature")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with display.stage(f"Load {parsed.model}"):
        model, tokenizer = load_model(ModelSection(path=parsed.model), device)
        if device == "cuda":
            model = model.to(torch.bfloat16)
    section = PromptsSection(student=benchmark.prompt) if benchmark.prompt else PromptsSection()
    prompts = Prompts(section, tokenizer)
    contexts = [prompts.ids(row, "student") for row in benchmark.rows]
    longest = parsed.max_new_tokens or convention.max_new_tokens
    limit = window(model)
    if limit is not None:
        room = limit - max(map(len, contexts))
        if parsed.max_new_tokens and longest > room:
            raise UserError(f"--max-new-tokens is {longest}: the model's window leaves {room}")
        if room < 1:
            raise UserError(
                f"--benchmark is {parsed.benchmark!r}: a problem exceeds the window of {limit}"
            )
        longest = min(longest, room)
    sampling = Sampling(longest, temperature)
    torch.manual_seed(parsed.seed)
    repeated = [context for context in contexts for _ in range(samples)]
    with display.stage(f"Answer {benchmark.name}", total=len(repeated)) as stage:
        rollouts = GenerateSampler(model, stop_ids(model, tokenizer)).sample(
            repeated, sampling, lambda sequences, tokens: stage.advance(sequences)
        )
    completions = decode(tokenizer, rollouts)
    answers = [row.answer for row in benchmark.rows for _ in range(samples)]
    with Grader() as grader, display.stage("Grade"):
        grades = grader.grade(completions, answers)
    outcomes = [
        [grade.correct for grade in grades[i : i + samples]] for i in range(0, len(grades), samples)
    ]
    accuracy, low, high = average_at_k(outcomes)
    truncated = sum(not rollout.finished for rollout in rollouts) / len(rollouts)
    length = sum(len(rollout.ids) for rollout in rollouts) / len(rollouts)
    result = {
        "model": parsed.model,
        "benchmark": benchmark.name,
        "source": benchmark.source,
        "problems": len(outcomes),
        "samples": samples,
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "pass_at_k": mean_pass_at_k(outcomes, samples),
        "temperature": temperature,
        "max_new_tokens": longest,
        "truncated_fraction": truncated,
        "mean_length": length,
        "seed": parsed.seed,
    }
    display.table(
        f"{parsed.model} on {benchmark.name}",
        [
            "problems",
            f"avg@{samples}",
            "95 % interval",
            f"pass@{samples}",
            "cut off",
            "mean length",
        ],
        [
            [
                str(len(outcomes)),
                f"{accuracy:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{result['pass_at_k']:.3f}",
                f"{truncated:.1%}",
                f"{length:.0f} tokens",
            ]
        ],
    )
    if parsed.output:
        from opsd.train import write_json

        result["versions"], result["machine"] = versions(), machine()
        result["answers"] = [
            {
                "problem": row.problem,
                "answer": row.answer,
                "completion": text,
                "correct": g.correct,
                "reason": g.reason,
            }
            for row, text, g in zip(
                (row for row in benchmark.rows for _ in range(samples)),
                completions,
                grades,
                strict=True,
            )
        ]
        write_json(Path(parsed.output), result)
        display.paths("Written", {"result": Path(parsed.output)})
