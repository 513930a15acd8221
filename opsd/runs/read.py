"""Reads what a run left on disk: one `opsd train` directory, or a quickstart with one a method.

Every file may be missing or cut off, because a report can be asked for while the run is still going
on; see `records`.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opsd.common.errors import UserError
from opsd.common.near import near_file
from opsd.common.statistics import wilson_interval
from opsd.runs.records import (
    EvaluationLine,
    Reader,
    Record,
    Sample,
    SavedConfig,
    StepLine,
    Summary,
    shown_text,
)

MARKS = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "summary.json")  # a run has one
COLD_START = "cold_start"
NAMES = {"opsd": "OPSD", "grpo": "GRPO", "sft": "SFT", "distill": "Distillation"}
NAMES[COLD_START] = "Cold start"
ORDER = list(NAMES)


@dataclass(frozen=True)
class Accuracy:
    """A rate in 0…1 and its 95 % interval (None where the number of problems is unknown)."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Point:
    """One evaluation of the student; x counts generated tokens, or trained tokens for SFT."""

    x: float
    accuracy: Accuracy
    step: int | None = None


@dataclass(frozen=True)
class Run:
    """The results in one method's directory."""

    method: str
    metrics: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)
    samples: list[Record] = field(default_factory=list)
    summary: Record = field(default_factory=dict)
    config: Record = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)  # the learning curve, by x

    @property
    def name(self) -> str:
        return NAMES.get(self.method, self.method)

    @property
    def trained_axis(self) -> bool:
        """Whether x counts trained tokens, as for SFT, which generates none."""
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
        """The tokens used: generated ones, or trained ones for SFT."""
        key = "trained_tokens" if self.trained_axis else "generated_tokens"
        spent = _latest(key, [self.summary], self.metrics)
        return spent if spent is not None or not self.points else self.points[-1].x


@dataclass(frozen=True)
class Results:
    """A run directory as reports and plots need it."""

    path: Path
    quickstart: bool
    finished: bool
    model: str
    runs: list[Run]
    summary: Record
    config: str | None
    troubles: list[str]  # a sentence for each file that could not be read
    base: Accuracy | None = None
    teacher: Accuracy | None = None
    pretrained: Accuracy | None = None
    problems: int | None = None

    @property
    def methods(self) -> list[Run]:
        """The runs to compare: without the cold start, which only made the others' base model."""
        return [run for run in self.runs if run.method != COLD_START] or self.runs

    @property
    def seconds(self) -> float | None:
        known = [run.seconds for run in self.runs if run.seconds is not None]
        return self.summary.get("seconds") or (sum(known) if known else None)

    @property
    def peak_memory(self) -> float | None:
        return self.summary.get("peak_memory_bytes")


def check_directory(run_dir: Path) -> None:
    """Raises UserError for what is no directory."""
    if not run_dir.is_dir():
        several = str(run_dir).split(",")
        if all(Path(one).is_dir() for one in several):
            raise UserError(f"{run_dir} is not a directory: write `{' '.join(several)}`")
        near = near_file(run_dir)
        raise UserError(f"{run_dir} is not a directory; give the directory of a run{near}")


def read_results(run_dir: Path) -> Results:
    """Read a run's or a quickstart's directory. Raises UserError where it is neither."""
    check_directory(run_dir := Path(run_dir))
    reader = Reader()
    summary = reader.file(run_dir / "summary.json", Summary)
    settings = reader.file(run_dir / "config.yaml", SavedConfig)
    children = [
        child
        for child in sorted(run_dir.iterdir())
        if child.is_dir()
        and not child.is_symlink()
        and any((child / mark).is_file() for mark in MARKS[:2])
    ]
    quickstart = summary.get("methods") is not None or bool(children)
    apart = not (run_dir / "quickstart.json").is_file()  # several runs' directories are in it
    if not quickstart and not any((run_dir / mark).is_file() for mark in MARKS):
        above = any((run_dir.parent / mark).is_file() for mark in (*MARKS, "config.yaml"))
        hint = f"; did you mean {str(run_dir.parent)!r}?" if above else ""
        raise UserError(
            f"{run_dir} holds no run{hint}; a run's directory has one of "
            f"{', '.join(MARKS)}, a quickstart's has one such directory a method"
        )
    if quickstart:
        runs = _quickstart_runs(children, summary, reader)
    else:
        method = summary.get("method") or settings.get("method") or "run"
        runs = [_read_run(run_dir, method, reader, summary, settings)]
    problems: Any = summary.get("problems") or _latest(
        "problems", *(run.evaluations for run in runs)
    )
    base, teacher = _starting_point(summary, runs, problems)
    before = summary.get("pretrained") or {}
    pretrained = _accuracy(before, before.get("problems") or problems)
    if quickstart:
        runs = [_from_base(run, base) for run in runs]
    model = summary.get("model") or (settings.get("model") or {}).get("path") or "Language model"
    return Results(
        path=run_dir,
        quickstart=quickstart,
        finished=bool(summary) or (apart and all(run.summary for run in runs)),
        model=model,
        runs=runs,
        summary=summary,
        config=shown_text(run_dir / "config.yaml"),
        troubles=reader.troubles,
        base=base,
        teacher=teacher,
        pretrained=pretrained,
        problems=problems,
    )


def _read_run(path: Path, method: str, reader: Reader, summary: Record, config: Record) -> Run:
    evaluations = _once(reader.records(path / "evaluations.jsonl", EvaluationLine), "step", "role")
    axis = "trained_tokens" if method == "sft" else "generated_tokens"
    points = []
    for record in evaluations:
        x = record.get(axis)
        x = 0 if x is None and record["step"] == 0 else x
        if record.get("role", "student") != "student":
            continue
        if x is None:
            where = f"{path.name}/evaluations.jsonl has no {axis} at step {record['step']}"
            reader.troubles.append(f"{where}, which the curve leaves out.")
        else:
            rate = _accuracy(record, record.get("problems"))
            points.append(Point(x, rate, record["step"]))
    return Run(
        method=method,
        metrics=_once(reader.records(path / "metrics.jsonl", StepLine), "step"),
        evaluations=evaluations,
        samples=reader.records(path / "samples.jsonl", Sample),
        summary=summary,
        config=config,
        points=sorted(points, key=lambda point: point.x),
    )


def _once(records: list[Record], *keys: str) -> list[Record]:
    """Keep one record a step, the last: a resumed run repeats the steps since its checkpoint."""
    return list({tuple(map(record.get, keys)): record for record in records}.values())


def _quickstart_runs(children: list[Path], summary: Record, reader: Reader) -> list[Run]:
    methods = summary.get("methods") or {}
    paths = {child.name: child for child in children}
    known = [*ORDER, *sorted({*paths, *methods} - {*ORDER})]
    runs = []
    for method in (name for name in known if name in paths or name in methods):
        run, told = Run(method), methods.get(method, {})
        if path := paths.get(method):
            own = reader.file(path / "summary.json", Summary)
            config = reader.file(path / "config.yaml", SavedConfig)
            run = _read_run(path, method, reader, own, config)
        # A directory without the runs' own files has the curve in its summary.
        points = run.points or [
            Point(x, _accuracy({"accuracy": y}, summary.get("problems")))
            for x, y in sorted(told.get("curve", []))
        ]
        runs.append(replace(run, summary={**run.summary, **told}, points=points))
    return runs


def _from_base(run: Run, base: Accuracy | None) -> Run:
    """Add the base's accuracy as the point at 0 tokens, where all methods start."""
    if base is None or not run.points or run.points[0].x == 0:
        return run
    return replace(run, points=[Point(0, base, 0), *run.points])


def _starting_point(
    summary: Record, runs: list[Run], problems: float | None
) -> tuple[Accuracy | None, Accuracy | None]:
    """(the base student's accuracy, the base teacher's): from the first evaluations, or summary."""
    told = summary.get("base") or {}
    student = _accuracy(told, problems)
    if student is None or student.low is None or any(run.points for run in runs):
        at_zero = [run.points[0].accuracy for run in runs if run.points and run.points[0].x == 0]
        same = [a for a in at_zero if student is None or abs(a.value - student.value) < 1e-9]
        student = same[0] if same else student
    if student is None:
        before = (summary.get("accuracy") or {}).get("before")
        student = _accuracy({"accuracy": before}, problems)
    shown = told.get("teacher_problems") or problems
    teacher = _accuracy({"accuracy": told.get("teacher_accuracy")}, shown)
    if teacher is None:
        records = [r for run in runs for r in run.evaluations if r.get("role") == "teacher"]
        teacher = _accuracy(records[0], problems) if records else None
    return student, teacher


def _accuracy(record: Record, problems: Any) -> Accuracy | None:
    rate, low, high = map(record.get, ("accuracy", "low", "high"))
    if rate is None:
        return None
    if (low is None or high is None) and problems:
        low, high = wilson_interval(rate * problems, problems)
    return Accuracy(rate, low, high)


def _latest(key: str, *lists: list[Record]) -> float | None:
    """The last number under `key` in the first of the lists that has it."""
    known = ([r[key] for r in records if r.get(key) is not None] for records in lists)
    return next((values[-1] for values in known if values), None)
