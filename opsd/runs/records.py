"""The schema of each file that a run or an evaluation leaves: types and bounds of all values that
are read; and the functions that read them.

A directory may come from a stranger, be in use, or be cut off: a missing file counts as empty, and
a last line without its end is left out. What does not fit its schema is reported by file and line,
and left out or refused.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, Strict
from pydantic import ValidationError as Invalid

from opsd.common.errors import UserError, in_short, problem_said
from opsd.common.files import lines_of, open_plain
from opsd.common.schema import FirstErrors
from opsd.config.yaml import load_yaml

Record = dict[str, Any]
STRANGE = 1000  # the most lines of a file that are blank or not a record


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which a diverging run writes, by None: they cannot be shown."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _day(value: str) -> str:
    return datetime.date.fromisoformat(value).isoformat()


Name = Annotated[str, Field(min_length=1, max_length=1000)]
Step = Annotated[int, Field(ge=0, le=10**12)]
Count = Annotated[int, Field(ge=1, le=10**12)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Amount = Annotated[int | float, Field(ge=0, le=1e18)]
Share = Annotated[float, Field(ge=0, le=1)]
Bound = Annotated[float, Field(ge=-1, le=2)]  # of an interval
Measure = Annotated[
    Annotated[int | float, Field(ge=-1e40, le=1e40)] | None, BeforeValidator(_finite)
]
Point = Annotated[tuple[Amount, Share], Strict(False)]
Choice = Annotated[tuple[str, Measure], Strict(False)]


class Schema(FirstErrors):
    """Types are strict (true is not 1, "1" is not 1); keys without a field may hold anything."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())
    longest: ClassVar[int] = 1 << 20  # bytes of a line, or of the file

    @property
    def record(self) -> Record:
        """The fields that the file has, by their keys."""
        return self.model_dump(exclude_unset=True)


class Anything(Schema):
    """A JSON object."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=True)


class Costs(Schema):
    """What a run has spent."""

    generated_tokens: Amount | None = None
    trained_tokens: Amount | None = None
    seconds: Amount | None = None


class Line(Costs):
    """A line of rollouts.jsonl, and the keys that the lines of all logs have."""

    longest = 1 << 26
    step: Step


class StepLine(Line):
    """A line of metrics.jsonl: one step. All keys without a field are measures."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Measure]
    longest = 1 << 20
    method: Name | None = None
    collapse: list[Name] = Field([])


class CountedStep(StepLine):
    """A metrics line from which a run resumes: its counters must be there."""

    generated_tokens: Step
    trained_tokens: Step
    seconds: Amount


class EvaluationLine(Line):
    """A line of evaluations.jsonl: one evaluation on the held-out problems."""

    role: Literal["student", "teacher"] = "student"
    accuracy: Share
    low: Bound | None = None
    high: Bound | None = None
    problems: Count | None = None


class Token(Schema):
    """A token of a sample."""

    text: str = ""
    divergence: Measure = None
    student_probability: Measure = None
    teacher: Annotated[list[Choice], Field(max_length=100)] | None = None


class Sample(Line):
    """A line of samples.jsonl: a held-out problem and the student's completion."""

    problem: str | None = None
    solution: str | None = None
    answer: str | None = None
    completion: str | None = None
    correct: bool | None = None
    tokens: Annotated[list[Token], Field(max_length=1 << 18)] = Field([])


class CompletionLine(Schema):
    """A line of an evaluation's completions-i-of-n.jsonl."""

    longest = 1 << 26
    problem: Step
    sample: Step
    text: str
    tokens: Step
    finished: bool


class EvaluationFile(Schema):
    """evaluation.json: the identity of the evaluation whose completions a directory holds."""

    identity: Record
    date: Annotated[str, Field(max_length=10), AfterValidator(_day)] | None = None


class Part(Costs):
    """A section of a summary or of a config."""

    accuracy: Share | None = None
    problems: Count | None = None
    teacher_accuracy: Share | None = None
    teacher_problems: Count | None = None
    before: Share | None = None
    after: Share | None = None
    curve: Annotated[list[Point], Field(max_length=100_000)] = Field([])
    path: Name | None = None
    policy: str | None = None
    step: Step | None = None
    seed: Seed | None = None
    problems_per_step: Count | None = None
    context: Name | None = None
    mix: Annotated[list[Part], Field(max_length=100)] | None = None
    routes: Annotated[dict[Name, Part], Field(max_length=100)] | None = None
    distil: Amount | None = None
    credit: Amount | None = None
    kl: Amount | None = None


class Summary(Costs):
    """summary.json of a run or a quickstart."""

    method: Name | None = None
    model: Name | None = None
    seed: Seed | None = None
    problems: Count | None = None
    peak_memory_bytes: Amount | None = None
    accuracy: Part | None = None
    best: Part | None = None
    base: Part | None = None
    pretrained: Part | None = None
    methods: Annotated[dict[Name, Part], Field(max_length=100)] | None = None
    versions: Any = None
    machine: Any = None


class SavedConfig(Schema):
    """config.yaml, with the fields that reports and comparisons read."""

    method: Name | None = None
    model: Part | None = None
    teacher: Part | None = None
    train: Part | None = None
    loss: Part | None = None
    prompts: Record | None = None


class TrainerState(Schema):
    """trainer_state.json, from which a run resumes. transformers adds keys of its own."""

    longest = 1 << 28
    global_step: Step
    epoch: Amount | None
    log_history: list[Record]
    max_steps: Step | None = None


Kind = TypeVar("Kind", bound=Schema)


def checked_lines(
    path: Path, kind: type[Kind], bad: list[str] | None = None
) -> Iterator[tuple[Kind, bytes]]:
    """Yield each line of a JSON-lines file, parsed as `kind` and as its bytes, with the newline.

    Lines that do not fit are appended to `bad`, as "file:line (why)"; without `bad` the first of
    them raises UserError.
    """
    strange = 0
    for number, line in lines_of(path, kind.longest):
        try:
            yield _parsed(line, kind, json.loads), line.removesuffix(b"\n") + b"\n"
            continue
        except ValueError as error:
            said, torn = str(error), not isinstance(error, Misfit)
        if torn and not line.endswith(b"\n"):
            return
        if (strange := strange + 1) > STRANGE:
            raise UserError(f"{str(path)!r} has more than {STRANGE} lines that no run writes")
        if line.strip() and bad is None:
            raise UserError(
                f"{str(path)!r} is damaged in line {number} ({said}); restore the line, or delete "
                "it to go on without it"
            )
        if line.strip():
            bad.append(f"{path.parent.name}/{path.name}:{number} ({said})")


def read_record(path: Path, kind: type[Kind]) -> Kind:
    """Read a JSON or YAML file. Raises UserError if it does not fit; FileNotFoundError."""
    with open_plain(path) as file:
        text = file.read(kind.longest + 1)
    try:
        if len(text) > kind.longest:
            raise ValueError(f"more than {kind.longest:,} bytes")
        return _parsed(text, kind, load_yaml if path.suffix == ".yaml" else json.loads)
    except ValueError as error:
        raise UserError(f"{str(path)!r} is damaged ({error})") from None


class Misfit(ValueError):
    """A complete text, not cut off, that does not fit its schema."""


def _parsed(text: bytes, kind: type[Kind], parse: Any) -> Kind:
    """Parse and check a text. Raises ValueError with a short message."""
    try:
        return kind.model_validate(parse(text.decode()))
    except Invalid as error:
        raise Misfit(problem_said(error.errors(include_url=False)[0])) from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(in_short(error)) from None


@dataclass
class Reader:
    """Reads a directory to show it. Files that cannot be read are left out; `troubles` has a
    sentence about each. Reading stops at a total of `lines` and `bytes`, to end in time."""

    troubles: list[str] = field(default_factory=list)
    lines: int = 1_000_000
    bytes: int = 1 << 28

    def records(self, path: Path, kind: type[Schema]) -> list[Record]:
        """The lines of a file that fit `kind`."""
        found: list[Record] = []
        bad: list[str] = []
        try:
            for one, line in checked_lines(path, kind, bad):
                self.lines, self.bytes = self.lines - 1, self.bytes - len(line)
                if min(self.lines, self.bytes) < 0:
                    raise UserError("too large")
                found.append(one.record)
        except (UserError, OSError) as error:
            self._say(path, f"was read up to its line {len(found) + len(bad)} only", error)
        if bad:
            more = f", and {len(bad) - 1} more of its lines" if len(bad) > 1 else ""
            self.troubles.append(f"{bad[0]} was left out{more}.")
        return found

    def file(self, path: Path, kind: type[Schema]) -> Record:
        """The values of a JSON or YAML file; {} if it is missing or cannot be read."""
        try:
            return read_record(path, kind).record
        except FileNotFoundError:
            return {}
        except (UserError, OSError) as error:
            self._say(path, "was left out", error)
            return {}

    def _say(self, path: Path, what: str, why: Any) -> None:
        said = (getattr(why, "strerror", None) or str(why)).removeprefix(f"{str(path)!r} ")
        self.troubles.append(f"{path.parent.name}/{path.name} {what} ({said}).")


def shown_text(path: Path) -> str | None:
    """The first megabyte of a file, to show as it is; None if it cannot be read."""
    try:
        with open_plain(path) as file:
            return file.read(Schema.longest).decode(errors="replace")
    except (UserError, OSError):
        return None
