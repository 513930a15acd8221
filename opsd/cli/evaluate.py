"""`opsd eval`: samples a model's answers to a benchmark, grades them, writes a table and a page."""

import datetime
import hashlib
import json
import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from opsd.common.display import Display
from opsd.common.errors import UserError
from opsd.common.files import write_file, write_json, write_lines
from opsd.common.system import machine, usable_cores, versions
from opsd.config.names import SERVERS
from opsd.config.sections import PromptsSection
from opsd.data.context_check import ContextCheck
from opsd.data.prompts import Prompts
from opsd.evaluate.answers import Completion, CompletionLog, claim, key, read_completions, read_file
from opsd.evaluate.benchmarks import Benchmark
from opsd.evaluate.result import Answer, grade_all, measure, remarks, table
from opsd.evaluate.subject import Subject
from opsd.grading.completions import completions as as_text
from opsd.grading.grader import Grader
from opsd.grading.references import check_references
from opsd.models.generation_config import left_out
from opsd.models.load import stop_ids, window
from opsd.quickstart.worksheet import WorksheetGrader
from opsd.report.evaluation_page import page
from opsd.rollout import SAMPLERS, Sampler, Sampling, check_engine, evaluation_server
from opsd.rollout.base import Contexts

RUNS = Path("runs/eval")
NO_DATE = "2000-01-01"
_DRAWN_BY = ("temperature", "top_p", "top_k", "max_new_tokens")
# Other engines' kernels round differently, so their answers are not bit for bit transformers'.
PRECISION = {"vllm": "bf16 by vLLM", "vllm_server": "the vLLM server's"}
PRECISION["sglang_server"] = "the SGLang server's"
Unit = tuple[int, int]  # (problem, sample)


def evaluate_command(asked: Namespace, benchmark: Benchmark, display: Display) -> None:
    """Samples K answers per problem, grades them, shows avg@K, maj@K, pass@k; see docs/evaluate.md.

    Answers that an earlier call or another process has sampled for the same evaluation are reused.
    The process that finds all answers present grades them and writes the result.
    """
    check_engine(asked.engine, "--engine")
    with display.stage(f"Read {asked.model}"):
        subject = Subject(asked.model, asked.local_rank)
        images = any(row.images for row in benchmark.rows)
        if images and asked.engine != "generate":
            raise UserError(f"--engine is {asked.engine!r}: only 'generate' samples from images")
        subject.read_images(images)
        thinking = _thinking(asked, benchmark, subject)
        # With a fixed date, so that the key does not change with the date that a template writes.
        prompts = _prompts(asked, subject, thinking, NO_DATE)
        check = ContextCheck(prompts, ["student"])
        for number, row in enumerate(benchmark.rows, start=1):
            check(number, row)
        check_references(benchmark.rows, "--columns answer", display.note)
        contexts = prompts.all_ids(benchmark.rows, "student")
        usual, samples = benchmark.convention.max_new_tokens, asked.samples
        sampling = _sampling(asked, usual, subject, contexts)
        identity = {
            "model": subject.digest,
            "benchmark": benchmark.digest(),
            "contexts": hashlib.sha256(json.dumps(contexts).encode()).hexdigest()[:16],
            "samples": samples,
            **{name: getattr(sampling, name) for name in _DRAWN_BY},
            "seed": asked.seed,
            "precision": PRECISION.get(asked.engine, subject.precision),
        }
    description = {
        "model": asked.model,
        "model_digest": subject.digest,
        "benchmark": benchmark.name,
        "source": benchmark.source,
        "revision": benchmark.revision,
        "benchmark_digest": identity["benchmark"],
        "left_out": benchmark.left_out,
        "thinking": thinking,
        "date": datetime.date.today().isoformat(),
        **{name: identity[name] for name in ("samples", *_DRAWN_BY, "seed", "precision")},
    }
    directory = Path(asked.output) if asked.output else RUNS / _name(asked, identity)
    description["date"] = date = claim(directory, identity, description)
    prompts = _prompts(asked, subject, thinking, date)
    contexts = prompts.all_ids(benchmark.rows, "student")
    units = [(p, s) for p in range(len(contexts)) for s in range(samples)]
    _sample(asked, subject, contexts, sampling, units, directory, display)
    completions = read_completions(directory)
    missing = len(set(units) - set(completions))
    if missing:
        display.note(
            f"Shard {asked.shard.index} of {asked.shard.count} is done; {missing} answers of other "
            "shards are missing. Whoever finishes last writes the result."
        )
        return
    in_thought = prompts.chats["student"].opens_thought
    found = [completions[unit] for unit in units]
    grader = WorksheetGrader() if asked.worksheets else Grader(workers=min(4, usable_cores()))
    _finish(benchmark, description, found, directory, in_thought, grader)


def _thinking(asked: Namespace, benchmark: Benchmark, subject: Subject) -> bool | None:
    """Returns the chat template's enable_thinking; None if it is unset or has no effect."""
    wanted = benchmark.convention.thinking if asked.thinking is None else asked.enable_thinking
    if wanted is None or subject.switches_thinking:
        return wanted
    if asked.thinking is not None:
        said = f"the chat template of {asked.model!r} does not look at enable_thinking"
        raise UserError(f"--thinking is {asked.thinking!r}: {said} (allowed: template)")
    return None


def _prompts(asked: Namespace, subject: Subject, thinking: bool | None, date: str) -> Prompts:
    given: dict[str, Any] = {"date": date}
    if asked.prompt is not None:
        given["student"] = asked.prompt
    if asked.system is not None:
        given |= {"system": asked.system, "student_system": None}
    if thinking is not None:
        given["student_chat"] = {**asked.prompts.student_chat, "enable_thinking": thinking}
    section = PromptsSection(**asked.prompts.model_dump() | given)
    return Prompts(section, subject.tokenizer)


def _sampling(asked: Namespace, usual: int, subject: Subject, contexts: Contexts) -> Sampling:
    """Returns how to sample, as asked. usual: the benchmark's longest answer."""
    longest = asked.max_new_tokens or usual
    if (limit := window(subject.config)) is not None:
        room = limit - max(map(len, contexts))
        if room < 1:
            said = f"--benchmark is {asked.benchmark!r}: a problem exceeds the model's window"
            raise UserError(f"{said} of {limit} tokens")
        if asked.max_new_tokens and longest > room:
            raise UserError(f"--max-new-tokens is {longest}: the model's window leaves {room}")
        longest = min(longest, room)
    # Settings without effect must not give the evaluation another key.
    top_p, top_k = (asked.top_p, asked.top_k) if asked.temperature else (1.0, 0)
    return Sampling(longest, asked.temperature, top_p, top_k, asked.batch_size)


def _sample(
    asked: Namespace,
    subject: Subject,
    contexts: Contexts,
    sampling: Sampling,
    units: Sequence[Unit],
    directory: Path,
    display: Display,
) -> None:
    """Samples the missing answers of this shard, batch by batch.

    A batch's seed depends on its problems, and a batch of which some answers exist is sampled again
    as a whole: an interrupted evaluation ends with the answers of an uninterrupted one.
    """
    with CompletionLog(directory, asked.shard, display.note) as log:
        bad: list[str] = []
        elsewhere = read_completions(directory, but=log.path, bad=bad)
        here = {completion.place for completion in read_file(log.path, bad)}
        if bad:
            display.note(f"{len(bad)} damaged lines are left out, their answers missing: {bad[0]}")
        mine = [u for u in units if asked.shard.has(u[0]) and u not in elsewhere]
        made = batches(mine, contexts, asked.batch_size)
        todo = [batch for batch in made if not here.issuperset(batch)]
        if not todo:
            return
        with display.stage(f"Load {asked.model}"):
            sampler = _sampler(asked, subject, directory, display)
        with display.stage(f"Answer {asked.benchmark}", total=len(mine), unit="answers") as stage:
            stage.advance(len(mine) - sum(map(len, todo)))
            stage.most_tokens = sum(map(len, todo)) * sampling.max_new_tokens
            for batch in todo:
                torch.manual_seed(batch_seed(asked.seed, batch))
                stage.phase("sampling")
                given = [contexts[problem] for problem, _ in batch]
                rollouts = sampler.sample(given, sampling, lambda _, tokens: stage.tokens(tokens))
                texts = as_text(subject.tokenizer, rollouts)
                log.append(
                    Completion(*unit, text, len(rollout.ids), rollout.finished)
                    for unit, text, rollout in zip(batch, texts, rollouts, strict=True)
                    if unit not in here
                )
                stage.advance(len(batch))


def _sampler(asked: Namespace, subject: Subject, directory: Path, display: Display) -> Sampler:
    if asked.engine in SAMPLERS:
        model = subject.load()
        if (unused := left_out(model)) is not None:
            display.note(unused)
        return SAMPLERS[asked.engine](model, stop_ids(model, subject.tokenizer))
    if asked.engine in SERVERS:
        where = asked.engine, asked.server, asked.model
        return evaluation_server(*where, subject.stops, subject.config, subject.load, directory)
    from opsd.rollout.vllm_colocated import ColocatedSampler

    return ColocatedSampler(
        asked.model,
        subject.stops,
        trains=False,
        dtype=torch.bfloat16,
        memory=asked.gpu_memory,
        max_num_seqs=asked.batch_size,
    )


def batches(units: Sequence[Unit], contexts: Contexts, size: int) -> list[list[Unit]]:
    """Batches units by context length, longest first: if memory runs out, it does so early."""
    order = sorted(units, key=lambda unit: (-len(contexts[unit[0]]), unit))
    return [order[start : start + size] for start in range(0, len(order), size)]


def batch_seed(seed: int, batch: Sequence[Unit]) -> int:
    """Hashes the seed and every unit of the batch to 63 bits."""
    digest = hashlib.sha256(json.dumps([seed, batch]).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def _finish(
    benchmark: Benchmark,
    description: dict[str, Any],
    completions: list[Completion],
    directory: Path,
    in_thought: bool,
    grader: Grader,
) -> None:
    """Grades all completions; writes answers.jsonl, result.json, report.html; shows the table."""
    display = Display()
    with grader, display.stage("Grade", total=len(completions)):
        answers = grade_all(benchmark.rows, completions, grader, in_thought)
        figures = measure(answers, grader, description["seed"])
    software = {**versions(), "math-verify": version("math-verify")}
    result = {**description, **figures, "versions": software, "machine": machine()}
    lines = (_line(benchmark, answer) for problem in answers for answer in problem)
    write_lines(directory / "answers.jsonl", lines)
    write_json(directory / "result.json", result)
    write_file(directory / "report.html", page(result, benchmark.rows, answers))
    name = f"{description['model']} on {description['benchmark']}"
    problems = f"{figures['problems']} problems"
    display.table(f"{name}, {problems}", ["", "rate", "95 % interval"], table(result))
    for remark in remarks(result):
        display.note(remark)
    names = ("result.json", "answers.jsonl", "report.html")
    display.paths("Written", {name: directory / name for name in names})


def _line(benchmark: Benchmark, answer: Answer) -> dict[str, Any]:
    completion, grade = answer.completion, answer.grade
    row = benchmark.rows[completion.problem]
    return {
        "problem": completion.problem,
        "sample": completion.sample,
        "text": row.problem,
        "answer": row.answer,
        "completion": completion.text,
        "tokens": completion.tokens,
        "finished": completion.finished,
        **asdict(grade),
    }


def _name(asked: Namespace, identity: dict[str, Any]) -> str:
    model = Path(asked.model).name or Path(asked.model).resolve().name
    parts = [model, Path(asked.benchmark).name]
    return "-".join([*(re.sub(r"[^\w.]+", "_", part)[:40] for part in parts), key(identity)])
