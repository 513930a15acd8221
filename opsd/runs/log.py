"""The files that a run writes as it goes, a line of JSON each: metrics, samples and the like."""

import json
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path

from opsd.common.files import append_to, read_lines, sync, write_lines
from opsd.runs.directory import NotWritten, written

FILES = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "rollouts.jsonl")


@dataclass
class Counters:
    """What a run has spent so far."""

    generated_tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0


class RunLog:
    """Appends lines to a run directory's files.

    `step` is where the run starts: 0, or the checkpoint's step on resume. Lines of later steps,
    which an interrupted run may have left, are dropped: each step has one line. So are samples
    without their evaluation, which is written after them. The counters go on from the last line.
    Of several processes one `writes`; the others count.
    """

    def __init__(self, directory: Path, step: int = 0, writes: bool = True):
        self.directory, self.writes = directory, writes
        self.counters = Counters()
        self.failure: NotWritten | None = None
        self.unwritten: dict[str, list[dict]] = {name: [] for name in FILES}
        there = {name: read_lines(directory / name) for name in FILES}
        kept = {
            name: [line for line in lines if step and line["step"] <= step]
            for name, lines in there.items()
        }
        self.dropped = len(there["metrics.jsonl"]) - len(kept["metrics.jsonl"])  # steps not saved
        self.past = kept["metrics.jsonl"]  # the lines of the steps before
        done = {e["step"] for e in kept["evaluations.jsonl"] if e["role"] == "student"}
        kept["samples.jsonl"] = [s for s in kept["samples.jsonl"] if s["step"] in done]
        if kept["metrics.jsonl"]:
            last = kept["metrics.jsonl"][-1]
            self.counters = Counters(
                last["generated_tokens"], last["trained_tokens"], last["seconds"]
            )
        for name, lines in kept.items():
            if writes and (directory / name).exists():
                write_lines(directory / name, lines)

    def is_evaluated(self, step: int) -> bool:
        """Whether the student of this step has been measured."""
        lines = read_lines(self.directory / "evaluations.jsonl")
        return any(line["role"] == "student" and line["step"] == step for line in lines)

    def best(self) -> tuple[int, float, int] | None:
        """The best evaluation of the student, the first of equal ones: its step and accuracy, and
        how many came after it. None: there is no evaluation yet."""
        name = "evaluations.jsonl"
        lines = read_lines(self.directory / name) + self.unwritten[name]
        lines = [line for line in lines if line["role"] == "student"]
        if not lines:
            return None
        place = max(range(len(lines)), key=lambda i: lines[i]["accuracy"])
        return lines[place]["step"], lines[place]["accuracy"], len(lines) - 1 - place

    def sync(self) -> None:
        """Have the disk keep what has been written."""
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
                file.write((json.dumps(line, ensure_ascii=False) + "\n").encode(errors="replace"))
        except NotWritten as failure:
            self.failure = failure
            self.unwritten[name].append(line)

    def check(self) -> None:
        """Raises NotWritten where a line could not be written; the step that it is of is done."""
        if self.failure is not None:
            raise self.failure

    def copy_to(self, directory: Path) -> None:
        """All lines, also those that could not be written."""
        for name in FILES:
            write_lines(directory / name, read_lines(self.directory / name) + self.unwritten[name])

    metrics = partialmethod(_append, "metrics.jsonl")  # a training step
    evaluation = partialmethod(_append, "evaluations.jsonl")  # a pass over the held-out problems
    sample = partialmethod(_append, "samples.jsonl")  # a completion, its tokens' divergences
    rollout = partialmethod(_append, "rollouts.jsonl")  # one that was trained on
