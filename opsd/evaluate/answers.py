"""Store an evaluation's completions on disk: append them one by one, read them all back.

A directory belongs to one evaluation, described in `evaluation.json`. Each process appends to its
own file, `completions-<i>-of-<n>.jsonl`. The evaluation's completions are the union of these files,
so more or fewer processes than began an evaluation may continue it. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opsd.common.errors import UserError
from opsd.common.files import append_to, is_unfinished, try_lock, write_json
from opsd.runs.records import CompletionLine, EvaluationFile, checked_lines, read_record


@dataclass(frozen=True)
class Completion:
    """A model's text for a sample of a problem, both counted from 0; not finished: truncated."""

    problem: int
    sample: int
    text: str
    tokens: int
    finished: bool

    @property
    def place(self) -> tuple[int, int]:
        return self.problem, self.sample


class CompletionLog:
    """A shard's file, open for appending. Raises UserError if another process has it open."""

    def __init__(self, directory: Path, shard: Shard, note: Callable[[str], None] = print):
        self.path = directory / f"completions-{shard.index}-of-{shard.count}.jsonl"
        self._file = append_to(self.path)
        locked = try_lock(self._file)
        if locked is None:
            note(f"--output: {directory} has no locks; give each process its own --shard")
        if locked is False:
            self._file.close()
            raise UserError(
                f"--output: another process is writing {self.path}; give each its own --shard"
            )
        end = self._file.seek(0, os.SEEK_END)
        start = self._file.seek(max(0, end - CompletionLine.longest))
        whole = self._file.read().rfind(b"\n") + 1  # a killed process may leave half a line
        self._file.truncate(start + whole if whole or not start else end)

    def __enter__(self) -> CompletionLog:
        return self

    def __exit__(self, *_exception) -> None:
        self._file.close()

    def append(self, completions: Iterable[Completion]) -> None:
        """Appends completions and syncs them to the disk."""
        lines = [json.dumps(asdict(completion)) + "\n" for completion in completions]
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())


def read_completions(
    directory: Path, but: Path | None = None, bad: list[str] | None = None
) -> dict[tuple[int, int], Completion]:
    """Reads all files except `but`: (problem, sample) → completion. Damaged lines are left out and
    described in `bad`; their answers will be sampled again. Of two completions for one sample the
    first file's counts."""
    found: dict[tuple[int, int], Completion] = {}
    for path in sorted(directory.glob("completions-*-of-*.jsonl")):
        if path != but:
            for completion in read_file(path, bad):
                found.setdefault(completion.place, completion)
    return found


def read_file(path: Path, bad: list[str] | None = None) -> list[Completion]:
    """Reads one file; see read_completions."""
    lines = checked_lines(path, CompletionLine, [] if bad is None else bad)
    return [Completion(**line.record) for line, _ in lines]


def key(identity: Mapping[str, Any]) -> str:
    """A short hash of all that determines an evaluation's completions."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]


def claim(directory: Path, identity: Mapping[str, Any], description: Mapping[str, Any]) -> str:
    """Assigns `directory` to this evaluation; returns the date on which it began.

    Raises UserError, naming what differs, if it belongs to another evaluation: answers of two
    evaluations must not mix."""
    path = directory / "evaluation.json"
    if os.path.lexists(path):
        try:
            saved = read_record(path, EvaluationFile)
        except UserError as error:
            raise UserError(f"--output: {error}; choose another directory") from None
        there = saved.identity
        differing = [name for name in identity if identity[name] != there.get(name)]
        if differing:
            shown = {n: repr(there.get(n))[:100] for n in differing}
            what = ", ".join(f"{n} {said}, now {identity[n]!r}" for n, said in shown.items())
            raise UserError(f"--output is {str(directory)!r}: it holds another evaluation ({what})")
        return saved.date or description.get("date", "")
    if directory.exists() and not (directory.is_dir() and all(map(_claiming, directory.iterdir()))):
        raise UserError(
            f"--output is {str(directory)!r}: neither an empty directory nor an evaluation's"
        )
    directory.mkdir(parents=True, exist_ok=True)
    write_json(path, {"identity": dict(identity), **description})
    return description.get("date", "")


def _claiming(path: Path) -> bool:
    """Whether another process that claims the same directory may be writing this file."""
    return is_unfinished(path) or path.name == "evaluation.json"


@dataclass(frozen=True)
class Shard:
    """Process number `index`, from 1, of `count` that share one evaluation."""

    index: int = 1
    count: int = 1

    def has(self, problem: int) -> bool:
        """Whether this shard answers the problem with this number, from 0."""
        return problem % self.count == self.index - 1
