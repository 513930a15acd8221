"""What a run or an evaluation has left on disk, as its readers take it: the type and the bounds of
every value that is read, and one way to read it.

A directory may be a stranger's, or a run's that goes on or was cut off: a file that is not there is
empty, and a last line without its end is left out. What is not as its schema says is told by file
and line, and left out or refused.
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
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict
from pydantic import ValidationError as Invalid

from opsd.common.errors import UserError, in_short, problem_said
from opsd.common.files import lines_of, open_plain
from opsd.config.yaml import load_yaml

Record = dict[str, Any]
STRANGE = 1000  # lines of a file that may be blank or no record before the rest is not looked at


def _finite(value: Any) -> Any:
    """A diverging run writes NaN and infinity: they were measured, but are no numbers to show."""
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


class Schema(BaseModel):
    """No type is guessed (true is not 1, "1" is not 1); keys that nobody reads hold anything."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())
    longest: ClassVar[int] = 1 << 20  # bytes of a line, or of the file

    @property
    def record(self) -> Record:
        """The values that were written, by their keys."""
        return self.model_dump(exclude_unset=True)


class Anything(Schema):
    """A JSON object."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=True)


class Line(Schema):
    """rollouts.jsonl, and what all logs of a run have in a line."""

    longest = 1 << 26
    step: Step
    generated_tokens: Amount | None = None
    trained_tokens: Amount | None = None
    seconds: Amount | None = None


class StepLine(Line):
    """metrics.jsonl: a step. All other keys are measures."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Measure]
    longest = 1 << 20
    method: Name | None = None
    collapse: list[Name] = []


class CountedStep(StepLine):
    """A step that a run goes on from."""

    generated_tokens: Step
    trained_tokens: Step
    seconds: Amount


class EvaluationLine(Line):
    """evaluations.jsonl: a pass over the held-out problems."""

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
    """samples.jsonl: a held-out problem and what the student answered."""

    problem: str | None = None
    solution: str | None = None
    answer: str | None = None
    completion: str | None = None
    correct: bool | None = None
    tokens: Annotated[list[Token], Field(max_length=1 << 18)] = []


class CompletionLine(Schema):
    """completions-i-of-n.jsonl of an evaluation."""

    longest = 1 << 26
    problem: Step
    sample: Step
    text: str
    tokens: Step
    finished: bool


class EvaluationFile(Schema):
    """evaluation.json: whose completions a directory holds."""

    identity: Record
    date: Annotated[str, Field(max_length=10), AfterValidator(_day)] | None = None


class Part(Schema):
    """A section of a summary or of a config."""

    accuracy: Share | None = None
    problems: Count | None = None
    teacher_accuracy: Share | None = None
    teacher_problems: Count | None = None
    before: Share | None = None
    after: Share | None = None
    generated_tokens: Amount | None = None
    trained_tokens: Amount | None = None
    seconds: Amount | None = None
    curve: Annotated[list[Point], Field(max_length=100_000)] = []
    path: Name | None = None
    policy: str | None = None
    step: Step | None = None
    seed: Seed | None = None
    problems_per_step: Count | None = None
    context: Name | None = None
    mix: Annotated[list[Part], Field(max_length=100)] | None = None
    distil: Amount | None = None
    credit: Amount | None = None
    kl: Amount | None = None


class Summary(Schema):
    """summary.json of a run or a quickstart."""

    method: Name | None = None
    model: Name | None = None
    seed: Seed | None = None
    problems: Count | None = None
    generated_tokens: Amount | None = None
    trained_tokens: Amount | None = None
    seconds: Amount | None = None
    peak_memory_bytes: Amount | None = None
    accuracy: Part | None = None
    best: Part | None = None
    base: Part | None = None
    pretrained: Part | None = None
    methods: Annotated[dict[Name, Part], Field(max_length=100)] | None = None
    versions: Any = None
    machine: Any = None


class SavedConfig(Schema):
    """config.yaml, as far as a report or a comparison reads it."""

    method: Name | None = None
    model: Part | None = None
    teacher: Part | None = None
    train: Part | None = None
    loss: Part | None = None
    prompts: Record | None = None


class TrainerState(Schema):
    """trainer_state.json: what a run goes on with. transformers' releases add keys of their own."""

    longest = 1 << 28
    global_step: Step
    epoch: Amount | None
    log_history: list[Record]


Kind = TypeVar("Kind", bound=Schema)


def checked_lines(
    path: Path, kind: type[Kind], bad: list[str] | None = None
) -> Iterator[tuple[Kind, bytes]]:
    """Each line of a file of JSON lines, as `kind` and as it is written, with its end.

    Those that are not of this kind go to `bad`, as "file:line (why)"; without `bad` the first of
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
    """A JSON or YAML file of this kind. Raises UserError where it is not one; FileNotFoundError."""
    with open_plain(path) as file:
        text = file.read(kind.longest + 1)
    try:
        if len(text) > kind.longest:
            raise ValueError(f"more than {kind.longest:,} bytes")
        return _parsed(text, kind, load_yaml if path.suffix == ".yaml" else json.loads)
    except ValueError as error:
        raise UserError(f"{str(path)!r} is damaged ({error})") from None


class Misfit(ValueError):
    """A text that is whole, and thus not cut off, but not of its kind."""


def _parsed(text: bytes, kind: type[Kind], parse: Any) -> Kind:
    """Raises ValueError, whose text is short."""
    try:
        return kind.model_validate(parse(text.decode()))
    except Invalid as error:
        raise Misfit(problem_said(error.errors(include_url=False)[0])) from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(in_short(error)) from None


@dataclass
class Reader:
    """Reads a directory to show it. What cannot be read is left out; `troubles` says so, a sentence
    for each file. It reads as many lines and bytes in all as a person would wait for."""

    troubles: list[str] = field(default_factory=list)
    lines: int = 1_000_000
    bytes: int = 1 << 28

    def records(self, path: Path, kind: type[Schema]) -> list[Record]:
        """The lines of a file that are of this kind."""
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
        """The values of a JSON or YAML file; {} where there is none."""
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
    """A file to show as it is, no more than a person reads; None where there is none."""
    try:
        with open_plain(path) as file:
            return file.read(Schema.longest).decode(errors="replace")
    except (UserError, OSError):
        return None
