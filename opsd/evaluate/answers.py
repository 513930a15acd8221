"""The completions of an evaluation on disk: appended as they come, read back whole.

A directory belongs to one evaluation, described in `evaluation.json`. Each process appends to a
file of its own, `completions-<i>-of-<n>.jsonl`; what counts is the union of all such files, so that
an evaluation may be continued by more or fewer processes than began it. Needs no torch.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opsd.common.errors import UserError, in_short
from opsd.common.files import append_to, is_unfinished, read_lines, try_lock, write_json


@dataclass(frozen=True)
class Completion:
    """What the model wrote: `problem` and `sample` count from 0; not `finished`: cut off."""

    problem: int
    sample: int
    text: str
    tokens: int
    finished: bool

    @property
    def place(self) -> tuple[int, int]:
        return self.problem, self.sample


class CompletionLog:
    """One shard's file, open for appending. A second process on the same file is refused."""

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
        self._file.truncate(_whole_lines(self.path))  # a kill may have torn the last line

    def __enter__(self) -> CompletionLog:
        return self

    def __exit__(self, *_exception) -> None:
        self._file.close()

    def append(self, completions: Iterable[Completion]) -> None:
        """Writes them through to the disk."""
        lines = [json.dumps(asdict(completion)) + "\n" for completion in completions]
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())


def read_completions(directory: Path, but: Path | None = None) -> dict[tuple[int, int], Completion]:
    """(problem, sample) → completion, of all files `but` one. A torn last line is left out; of two
    completions for one place the first file's counts."""
    found: dict[tuple[int, int], Completion] = {}
    for path in sorted(directory.glob("completions-*-of-*.jsonl")):
        if path != but:
            for completion in read_file(path):
                found.setdefault(completion.place, completion)
    return found


def read_file(path: Path) -> list[Completion]:
    """The completions of one file."""
    try:
        return [Completion(**record) for record in read_lines(path)]
    except (ValueError, TypeError) as error:
        raise UserError(f"--output: {path} is damaged ({in_short(error)}); delete it") from error


def _whole_lines(path: Path) -> int:
    """The bytes up to and with the last newline."""
    return path.read_bytes().rfind(b"\n") + 1


def key(identity: Mapping[str, Any]) -> str:
    """A short hash of what decides an evaluation's completions."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]


def claim(
    directory: Path, identity: Mapping[str, Any], description: Mapping[str, Any]
) -> dict[str, Any]:
    """Makes `directory` this evaluation's; returns the description that it began with.

    UserError where it is another one's, naming what differs: answers of two evaluations must not
    mix."""
    path = directory / "evaluation.json"
    if path.exists():
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            there = dict(saved["identity"])
            datetime.date.fromisoformat(saved.get("date", "2000-01-01"))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--output: {path} is damaged ({error})") from error
        differing = [name for name in identity if identity[name] != there.get(name)]
        if differing:
            what = ", ".join(f"{n} {there.get(n)!r}, now {identity[n]!r}" for n in differing)
            raise UserError(f"--output is {str(directory)!r}: it holds another evaluation ({what})")
        return saved
    if directory.exists() and not (directory.is_dir() and all(map(_claiming, directory.iterdir()))):
        raise UserError(
            f"--output is {str(directory)!r}: neither an empty directory nor an evaluation's"
        )
    directory.mkdir(parents=True, exist_ok=True)
    write_json(path, {"identity": dict(identity), **description})
    return dict(description)


def _claiming(path: Path) -> bool:
    """Whether this is what another process of the same evaluation is just writing."""
    return is_unfinished(path) or path.name == "evaluation.json"


@dataclass(frozen=True)
class Shard:
    """The `index`-th (from 1) of `count` processes that share one evaluation."""

    index: int = 1
    count: int = 1

    def has(self, problem: int) -> bool:
        """Whether the problem with this number (from 0) is this shard's."""
        return problem % self.count == self.index - 1
