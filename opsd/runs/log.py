"""Writes a run's files of JSON lines: metrics, evaluations, samples and rollouts."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any

from opsd.common.files import append_to, sync, write_file
from opsd.runs.directory import NotWritten, written
from opsd.runs.records import CountedStep, EvaluationLine, Line, Sample, checked_lines

FILES: dict[str, type[Any]] = {
    "metrics.jsonl": CountedStep,
    "evaluations.jsonl": EvaluationLine,
    "samples.jsonl": Sample,
    "rollouts.jsonl": Line,
}


@dataclass
class Counters:
    """The tokens and seconds that a run has used so far."""

    generated_tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0


class RunLog:
    """Appends lines to a run directory's files.

    `start`: 0, or the checkpoint's step on resume. Lines of later steps, which an interrupted run
    may have left, are dropped, so that each step has one line. Samples are dropped if their
    evaluation, which is written after them, is missing. Counters continue from the last line. Only
    one process `writes`; the others count.
    """

    def __init__(self, directory: Path, start: int = 0, writes: bool = True):
        self.directory, self.writes = directory, writes
        self.counters = Counters()
        self.failure: NotWritten | None = None
        self.unwritten: dict[str, list[dict]] = {name: [] for name in FILES}
        there = {
            name: [(one.step, line) for one, line in checked_lines(directory / name, kind)]
            for name, kind in FILES.items()
        }
        done = {line.step for line in student_curve(directory)}
        kept = {
            name: [
                line
                for step, line in lines
                if start and step <= start and (name != "samples.jsonl" or step in done)
            ]
            for name, lines in there.items()
        }
        self.dropped = len(there["metrics.jsonl"]) - len(kept["metrics.jsonl"])  # steps to do again
        self.past = list(map(json.loads, kept["metrics.jsonl"]))  # earlier steps
        if self.past:
            self.counters = Counters(*(self.past[-1][name] for name in asdict(self.counters)))
        for name, lines in kept.items():
            if writes and (directory / name).exists():
                write_file(directory / name, b"".join(lines))

    def is_evaluated(self, step: int) -> bool:
        """Whether the student was evaluated at this step."""
        return any(line.step == step for line in student_curve(self.directory))

    def best(self) -> tuple[int, float, int] | None:
        """(step, accuracy, evaluations since) of the student's best evaluation, the first of equal
        ones. None if there is no evaluation yet."""
        unwritten = map(EvaluationLine.model_validate, self.unwritten["evaluations.jsonl"])
        lines = student_curve(self.directory) + [one for one in unwritten if one.role == "student"]
        if not lines:
            return None
        place = max(range(len(lines)), key=lambda i: lines[i].accuracy)
        return lines[place].step, lines[place].accuracy, len(lines) - 1 - place

    def sync(self) -> None:
        """Flush the files to the disk."""
        for path in map(self.directory.joinpath, FILES if self.writes else ()):
            if path.exists():
                sync(path)

    def _append(self, name: str, line: dict) -> None:
        if not self.writes:
            return
        try:
            if self.failure is not None:
                raise self.failure
            with written(self.directory, name), append_to(self.directory / name) as file:
                file.write(_as_line(line))
        except NotWritten as failure:
            self.failure = failure
            self.unwritten[name].append(line)

    def check(self) -> None:
        """Raise NotWritten if a line could not be written. The step of that line is complete."""
        if self.failure is not None:
            raise self.failure

    def copy_to(self, directory: Path) -> None:
        """Write all lines to another directory, including those that could not be written here."""
        for name, kind in FILES.items():
            lines = [line for _, line in checked_lines(self.directory / name, kind)]
            lines += map(_as_line, self.unwritten[name])
            write_file(directory / name, b"".join(lines))

    metrics = partialmethod(_append, "metrics.jsonl")  # one line for each training step
    evaluation = partialmethod(_append, "evaluations.jsonl")  # one for each evaluation
    sample = partialmethod(_append, "samples.jsonl")  # one for each held-out completion
    rollout = partialmethod(_append, "rollouts.jsonl")  # one for each rollout in the loss


def student_curve(directory: Path) -> list[EvaluationLine]:
    """The student's evaluations in a run's directory, in order."""
    lines: Iterator[Any] = checked_lines(directory / "evaluations.jsonl", EvaluationLine)
    return [line for line, _ in lines if line.role == "student"]


def _as_line(record: dict) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode(errors="replace")
