"""The arguments of `opsd eval`, which are checked before torch is imported."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from opsd.common.errors import UserError, problem_said
from opsd.common.strict_json import read_object
from opsd.common.templates import check_shows, fill_in_columns
from opsd.common.urls import check_address
from opsd.config.names import ENGINES, HOTTEST, SERVERS
from opsd.config.sections import PromptsSection
from opsd.evaluate.answers import Shard
from opsd.evaluate.benchmarks import KNOWN, Benchmark, Convention, load_benchmark
from opsd.quickstart.settings import ARGUMENTS

if TYPE_CHECKING:
    from opsd.config.config import Config

WORDS = {"engines": "|".join(ENGINES)}
BATCH = {"generate": 64, "continuous": 64, "vllm": 512, **dict.fromkeys(SERVERS, 512)}
"""Default batch size of each engine; servers decide themselves how many answers they decode."""
THINKING = {"on": True, "off": False, "template": None}
"""--thinking → the chat template's enable_thinking; None leaves it unset."""


def run(parsed: argparse.Namespace) -> None:
    """Checks the arguments, then evaluates the model. Raises UserError."""
    check(parsed)
    from opsd.cli.first_look import check_hub, check_model, import_torch, of_run
    from opsd.common.display import Display

    place = Path(parsed.model)
    parsed.model, run = of_run(parsed.model)
    check_model(parsed.model, "MODEL")
    display = Display(quiet=parsed.ranked and parsed.shard.index > 1)
    benchmark = _benchmark(parsed, run)
    for name in ("samples", "temperature", "top_p"):
        if getattr(parsed, name) is None:
            setattr(parsed, name, getattr(benchmark.convention, name))
    if parsed.temperature == 0 and parsed.samples > 1:
        said = "greedy answers are all alike; give --samples 1, or a --temperature above 0"
        raise UserError(f"--samples is {parsed.samples}: {said}")
    check_hub(parsed.model, "MODEL")
    # The worksheets of `quickstart --tiny` have a grader of their own.
    made = place.absolute().parent / ARGUMENTS
    tiny = made.is_file() and read_object(made, "MODEL").get("tiny") is True
    parsed.worksheets = tiny and benchmark.name == "held-out"
    if parsed.prompt is not None:
        check_shows("--prompt", parsed.prompt, "problem")
        row = benchmark.rows[0]
        shown = {"images": ""} if row.images else {}
        fill_in_columns("--prompt", parsed.prompt, [row.columns | row.texts | shown])
    import_torch(display)
    from opsd.cli.evaluate import evaluate_command

    evaluate_command(parsed, benchmark, display)


def _benchmark(parsed: argparse.Namespace, run: Config | None) -> Benchmark:
    """Loads --benchmark; without it, takes a run's held-out problems and that run's prompts."""
    parsed.prompts = PromptsSection()
    if parsed.benchmark is not None:
        columns = run.data.columns if run and Path(parsed.benchmark).exists() else {}
        return load_benchmark(
            parsed.benchmark,
            columns={**columns, **parsed.columns},
            split=parsed.split,
            limit=parsed.problems,
            seed=parsed.seed,
            revision=parsed.revision,
        )
    if run is None:
        raise UserError(f"--benchmark is missing: {', '.join(KNOWN)}, a file or a hub name")
    from opsd.config.requirements import longest_answer
    from opsd.training.load_data import load_data

    parsed.prompts = run.prompts
    rows = load_data(run)[1][: parsed.problems]
    if not rows:
        raise UserError("--benchmark is missing: the run has no held-out problems (eval.problems)")
    source = run.eval.source or f"held out of {run.data.source}"
    parsed.benchmark = "held-out"
    return Benchmark("held-out", source, rows, Convention(max_new_tokens=longest_answer(run)))


def check(parsed: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> None:
    """Checks the arguments. None means: use the benchmark's convention. Raises UserError.

    `columns` becomes a dictionary, `shard` a Shard. Adds `enable_thinking` for the chat template;
    `local_rank`; and `ranked`, true if the shard is the rank that a launcher such as torchrun gave
    (launchers show the output of all processes, so only the first one may print).
    """
    if parsed.thinking is not None and parsed.thinking not in THINKING:
        raise UserError(f"--thinking is {parsed.thinking!r}: it must be on, off or template")
    if parsed.engine not in ENGINES:
        raise UserError(f"--engine is {parsed.engine!r}: it must be {' or '.join(ENGINES)}")
    _check_server(parsed)
    parsed.batch_size = parsed.batch_size or BATCH[parsed.engine]
    parsed.columns = _columns(parsed.columns)
    parsed.enable_thinking = THINKING.get(parsed.thinking)
    parsed.ranked = parsed.shard is None
    parsed.shard = _shard(parsed.shard, environment)
    parsed.local_rank = _number("LOCAL_RANK", environment.get("LOCAL_RANK", "0"), 0)


def _check_server(parsed: argparse.Namespace) -> None:
    if parsed.engine in SERVERS and parsed.server is None:
        raise UserError(f"--server is missing, as in --server {SERVERS[parsed.engine]}")
    if parsed.engine not in SERVERS and parsed.server is not None:
        engines = f"--engine {' or '.join(SERVERS)}, not {parsed.engine}"
        raise UserError(f"--server is {parsed.server!r}: it is for {engines}")
    if parsed.engine.startswith("vllm") and (parsed.temperature or 0) > HOTTEST:
        most = f"vLLM draws at temperatures up to {HOTTEST:g}"
        raise UserError(f"--temperature is {parsed.temperature:g}: {most}")
    if parsed.server is not None:
        try:
            check_address(parsed.server)
        except ValueError as error:
            problem = {"loc": ["--server"], "input": parsed.server, "msg": str(error)}
            raise UserError(problem_said(problem)) from None


def _columns(text: str | None) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",")] if text else []
    columns = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    if not all(columns) or not all(columns.values()):
        raise UserError(f"--columns is {text!r}: it must list OURS=THEIRS, as in problem=question")
    return columns


def _shard(text: str | None, environment: Mapping[str, str]) -> Shard:
    """Reads `--shard`, or else RANK and WORLD_SIZE, which launchers such as torchrun set."""
    if text is None:
        count = _number("WORLD_SIZE", environment.get("WORLD_SIZE", "1"), 1)
        rank = _number("RANK", environment.get("RANK", "0"), 0)
        if rank >= count:
            raise UserError(f"RANK is {rank}: it must be below WORLD_SIZE, {count}")
        return Shard(rank + 1, count)
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard is {text!r}: it must be I/N with I from 1 to N, such as 1/4")
    return Shard(int(match[1]), int(match[2]))


def _number(name: str, text: str, least: int) -> int:
    if not re.fullmatch(r"\d{1,6}", text) or int(text) < least:
        raise UserError(f"{name} is {text!r}: it must be a number from {least}")
    return int(text)
