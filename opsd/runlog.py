"""The files that a run writes as it goes: metrics, evaluations and samples, one JSON line each."""

import json
from dataclasses import dataclass
from pathlib import Path

FILES = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl")


@dataclass
class Counters:
    """What a run has spent so far."""

    generated_tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0


class RunLog:
    """Appends lines to a run directory's files.

    `step` is where the run starts: 0, or the checkpoint's step when it is resumed. Lines of later
    steps, which an interrupted run may have left, are dropped, so that there are no duplicates; the
    counters go on from the last line kept.
    """

    def __init__(self, directory: Path, step: int = 0):
        self.directory = directory
        self.counters = Counters()
        for name in FILES:
            path = directory / name
            kept = [line for line in read_lines(path) if step and line["step"] <= step]
            if path.exists():
                _write_whole(path, kept)
            if name == "metrics.jsonl" and kept:
                last = kept[-1]
                self.counters = Counters(
                    last["generated_tokens"], last["trained_tokens"], last["seconds"]
                )

    def metrics(self, line: dict) -> None:
        """A training step."""
        self._append("metrics.jsonl", line)

    def evaluation(self, line: dict) -> None:
        """A pass over the held-out problems."""
        self._append("evaluations.jsonl", line)

    def sample(self, line: dict) -> None:
        """A completion with its tokens' divergences."""
        self._append("samples.jsonl", line)

    def _append(self, name: str, line: dict) -> None:
        with (self.directory / name).open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> list[dict]:
    """The file's whole lines; a last one that a crash cut short is left out. [] if no file."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


def _write_whole(path: Path, lines: list[dict]) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    beside.replace(path)
