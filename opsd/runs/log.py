"""The files that a run writes as it goes, a line of JSON each: metrics, samples and the like."""

import json
from dataclasses import dataclass
from pathlib import Path

from opsd.common.files import read_lines, write_lines

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
        kept = {
            name: [line for line in read_lines(directory / name) if step and line["step"] <= step]
            for name in FILES
        }
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

    def metrics(self, line: dict) -> None:
        """A training step."""
        self._append("metrics.jsonl", line)

    def evaluation(self, line: dict) -> None:
        """A pass over the held-out problems."""
        self._append("evaluations.jsonl", line)

    def is_evaluated(self, step: int) -> bool:
        """Whether the student of this step has been measured."""
        lines = read_lines(self.directory / "evaluations.jsonl")
        return any(line["role"] == "student" and line["step"] == step for line in lines)

    def sample(self, line: dict) -> None:
        """A completion with its tokens' divergences."""
        self._append("samples.jsonl", line)

    def rollout(self, line: dict) -> None:
        """A rollout that was trained on."""
        self._append("rollouts.jsonl", line)

    def _append(self, name: str, line: dict) -> None:
        if not self.writes:
            return
        with (self.directory / name).open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
