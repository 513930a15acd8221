"""Reading what a run left on disk: one `opsd train` directory, or a quickstart with one a method.

Everything here may be missing or cut off, because a report can be asked for while the run is still
going on: a file that is not there is empty, a line that cannot be read is skipped and mentioned.
"""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from opsd.common.errors import UserError
from opsd.common.files import read_lines
from opsd.common.statistics import wilson_interval
from opsd.config.yaml import load_yaml

Record = dict[str, Any]
MARKS = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "summary.json")  # any: it is a run
COLD_START = "cold_start"
NAMES = {
    "opsd": "OPSD",
    "grpo": "GRPO",
    "sft": "SFT",
    "distill": "Distillation",
    COLD_START: "Cold start",
}
ORDER = list(NAMES)


@dataclass(frozen=True)
class Accuracy:
    """A rate in 0…1 and its 95 % interval (None where the number of problems is unknown)."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Point:
    """One evaluation of the student: x is generated tokens, for SFT trained tokens."""

    x: float
    accuracy: Accuracy
    step: int | None = None


@dataclass(frozen=True)
class Run:
    """One method's directory."""

    method: str
    metrics: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)
    samples: list[Record] = field(default_factory=list)
    summary: Record = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)  # accuracy as training goes on, by x

    @property
    def name(self) -> str:
        return NAMES.get(self.method, self.method)

    @property
    def trained_axis(self) -> bool:
        """SFT generates nothing: its budget is the tokens it trains on."""
        return self.method == "sft"

    @property
    def best(self) -> Point:
        """The best evaluation, the first of equal ones."""
        return max(self.points, key=lambda point: point.accuracy.value)

    @property
    def seconds(self) -> float | None:
        return _latest("seconds", [self.summary], self.metrics)

    @property
    def tokens(self) -> float | None:
        """Tokens spent: generated, for SFT trained."""
        key = "trained_tokens" if self.trained_axis else "generated_tokens"
        spent = _latest(key, [self.summary], self.metrics)
        return spent if spent is not None or not self.points else self.points[-1].x


@dataclass(frozen=True)
class Results:
    """A run directory as the report and the plots see it."""

    path: Path
    quickstart: bool
    finished: bool
    model: str
    runs: list[Run]
    summary: Record
    config: str | None
    troubles: list[str]  # what could not be read, a sentence each
    base: Accuracy | None = None
    teacher: Accuracy | None = None
    pretrained: Accuracy | None = None
    problems: int | None = None

    @property
    def methods(self) -> list[Run]:
        """The runs that are compared: without the cold start, which only made their base."""
        return [run for run in self.runs if run.method != COLD_START] or self.runs

    @property
    def seconds(self) -> float | None:
        known = [run.seconds for run in self.runs if run.seconds is not None]
        return value(self.summary, "seconds") or (sum(known) if known else None)

    @property
    def peak_memory(self) -> float | None:
        return value(self.summary, "peak_memory_bytes")


def value(record: Any, key: str) -> float | None:
    """The finite number at `key`, or None; `record` may be anything."""
    found = record.get(key) if isinstance(record, dict) else None
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        return None
    return found


def read_results(run_dir: Path) -> Results:
    """Read a run directory or a quickstart directory. UserError where neither is found."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"report: {run_dir} is not a directory; give the directory of a run")
    troubles: list[str] = []
    summary = _read_json(run_dir / "summary.json", troubles)
    config = _read_text(run_dir / "config.yaml", troubles)
    children = [
        child
        for child in sorted(run_dir.iterdir())
        if child.is_dir() and any((child / mark).is_file() for mark in MARKS[:2])
    ]
    quickstart = isinstance(summary.get("methods"), dict) or bool(children)
    if not quickstart and not any((run_dir / mark).is_file() for mark in MARKS):
        raise UserError(
            f"report: {run_dir} holds no run; a run's directory has one of {', '.join(MARKS)}, "
            "a quickstart's has one such directory a method"
        )
    if quickstart:
        runs = _quickstart_runs(children, summary, troubles)
    else:
        method = str(summary.get("method") or _config_value(config, "method") or "run")
        runs = [_read_run(run_dir, method, troubles)]
    problems = value(summary, "problems") or _latest("problems", *(run.evaluations for run in runs))
    base, teacher = _starting_point(summary, runs, problems)
    before = summary.get("pretrained")
    pretrained = _accuracy(before, value(before, "problems") or problems)
    if quickstart:
        runs = [_from_base(run, base) for run in runs]
    model = summary.get("model") or _config_value(config, "model", "path") or "Language model"
    return Results(
        path=run_dir,
        quickstart=quickstart,
        finished=bool(summary),
        model=str(model),
        runs=runs,
        summary=summary,
        config=config,
        troubles=troubles,
        base=base,
        teacher=teacher,
        pretrained=pretrained,
        problems=int(problems) if problems else None,
    )


def _read_run(path: Path, method: str, troubles: list[str]) -> Run:
    evaluations = _once(_read_lines(path / "evaluations.jsonl", troubles), "step", "role")
    axis = "trained_tokens" if method == "sft" else "generated_tokens"
    points = []
    for record in evaluations:
        accuracy = _accuracy(record, value(record, "problems"))
        x = value(record, axis)
        x = 0 if x is None and value(record, "step") == 0 else x
        if accuracy and x is not None and record.get("role", "student") == "student":
            points.append(Point(x, accuracy, record.get("step")))
    return Run(
        method=method,
        metrics=_once(_read_lines(path / "metrics.jsonl", troubles), "step"),
        evaluations=evaluations,
        samples=_read_lines(path / "samples.jsonl", troubles),
        summary=_read_json(path / "summary.json", troubles),
        points=sorted(points, key=lambda point: point.x),
    )


def _once(records: list[Record], *keys: str) -> list[Record]:
    """One record a step, the last written: a resumed run repeats the steps since its checkpoint."""
    return list({repr([record.get(key) for key in keys]): record for record in records}.values())


def _quickstart_runs(children: list[Path], summary: Record, troubles: list[str]) -> list[Run]:
    methods = summary.get("methods") if isinstance(summary.get("methods"), dict) else {}
    paths = {child.name: child for child in children}
    known = [*ORDER, *sorted({*paths, *methods} - {*ORDER})]
    runs = []
    for method in (name for name in known if name in paths or name in methods):
        run = _read_run(paths[method], method, troubles) if method in paths else Run(method)
        told = methods.get(method) if isinstance(methods.get(method), dict) else {}
        points = run.points or _curve(told, value(summary, "problems"))
        runs.append(replace(run, summary={**run.summary, **told}, points=points))
    return runs


def _curve(told: Record, problems: float | None) -> list[Point]:
    """The curve that quickstart's summary tells, for a directory without the runs themselves."""
    points = []
    for pair in told.get("curve") or []:
        if isinstance(pair, list) and len(pair) == 2:
            record = {"x": pair[0], "accuracy": pair[1]}
            accuracy = _accuracy(record, problems)
            if accuracy and value(record, "x") is not None:
                points.append(Point(pair[0], accuracy))
    return sorted(points, key=lambda point: point.x)


def _from_base(run: Run, base: Accuracy | None) -> Run:
    """All methods start at the base: its accuracy is everybody's point at 0 tokens."""
    if base is None or not run.points or run.points[0].x == 0:
        return run
    return replace(run, points=[Point(0, base, 0), *run.points])


def _starting_point(
    summary: Record, runs: list[Run], problems: float | None
) -> tuple[Accuracy | None, Accuracy | None]:
    """(base student, base teacher): from the first evaluations, else from the summary."""
    told = summary.get("base") if isinstance(summary.get("base"), dict) else {}
    student = _accuracy(told, problems)
    if student is None or student.low is None or any(run.points for run in runs):
        at_zero = [run.points[0].accuracy for run in runs if run.points and run.points[0].x == 0]
        same = [a for a in at_zero if student is None or abs(a.value - student.value) < 1e-9]
        student = same[0] if same else student
    if student is None:
        before = summary.get("accuracy") if isinstance(summary.get("accuracy"), dict) else {}
        student = _accuracy({"accuracy": before.get("before")}, problems)
    shown = value(told, "teacher_problems") or problems
    teacher = _accuracy({"accuracy": told.get("teacher_accuracy")}, shown)
    if teacher is None:
        records = [r for run in runs for r in run.evaluations if r.get("role") == "teacher"]
        teacher = _accuracy(records[0], problems) if records else None
    return student, teacher


def _accuracy(record: Any, problems: float | None) -> Accuracy | None:
    rate = value(record, "accuracy")
    if rate is None:
        return None
    low, high = value(record, "low"), value(record, "high")
    if (low is None or high is None) and problems and problems >= 1 and 0 <= rate <= 1:
        low, high = wilson_interval(rate * int(problems), int(problems))
    return Accuracy(rate, low, high)


def _latest(key: str, *lists: list[Record]) -> float | None:
    """The last number under `key` in the first of the lists that has one."""
    for records in lists:
        for record in reversed(records):
            if value(record, key) is not None:
                return value(record, key)
    return None


def _config_value(config: str | None, *keys: str) -> Any:
    """A value in the resolved config; None where there is none or it is no YAML."""
    try:
        found = load_yaml(config or "")
    except yaml.YAMLError:
        return None
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _read_text(path: Path, troubles: list[str]) -> str | None:
    if not path.is_file():  # nor a pipe, which waits for a writer, or a device without an end
        return None
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        troubles.append(f"{path.name} could not be read ({error.strerror}).")
        return None


def _read_json(path: Path, troubles: list[str]) -> Record:
    text = _read_text(path, troubles)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        troubles.append(f"{path.parent.name}/{path.name} is not a JSON object, so it was left out.")
        return {}
    return found


def _read_lines(path: Path, troubles: list[str]) -> list[Record]:
    """Records of a JSON-lines file. A last line without its end is being written: no trouble."""
    bad: list[int] = []
    try:
        records = read_lines(path, bad)
    except OSError as error:
        troubles.append(f"{path.name} could not be read ({error.strerror}).")
        return []
    if bad:
        where, numbers = f"{path.parent.name}/{path.name}", ", ".join(map(str, bad))
        troubles.append(f"{where}: line {numbers} could not be read and was left out.")
    return records
