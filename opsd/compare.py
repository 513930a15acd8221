"""Finished runs side by side: methods by seeds, at an equal budget, and what an accuracy costs.

Reads run directories as the report does; trains nothing and needs no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from opsd.errors import UserError
from opsd.evaluate.metrics import student_quantile
from opsd.report.runs import NAMES, ORDER, Record, Run, read_results, value

CONFIDENCE = 0.90
GRID = 60  # points of a mean curve


@dataclass(frozen=True)
class Interval:
    """A mean with its 90 % interval over seeds; None where one seed says nothing of it."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class SeedRun:
    """One finished run: its curve (tokens, accuracy), and what its tokens cost.

    seconds: (tokens, cumulative seconds) a training step; flops: of the whole run, None where the
    model's size is not known; prompts_counted: whether they include the prompts'.
    """

    path: Path
    method: str
    seed: int | None
    curve: list[tuple[float, float]]
    bands: list[tuple[float, float] | None]
    seconds: list[tuple[float, float]]
    flops: float | None
    prompts_counted: bool
    trained_axis: bool
    problems: int | None

    @property
    def budget(self) -> float:
        """The tokens at its last evaluation."""
        return self.curve[-1][0]

    def reaches(self, target: float) -> float | None:
        """Tokens at which the curve first is at `target`, None if it never is."""
        previous = self.curve[0]
        if previous[1] >= target:
            return previous[0]
        for point in self.curve[1:]:
            if point[1] >= target:
                share = (target - previous[1]) / (point[1] - previous[1])
                return previous[0] + share * (point[0] - previous[0])
            previous = point
        return None


@dataclass(frozen=True)
class Method:
    """All seeds of one method. `cost`: tokens to the target, None where no or not every seed got
    there (`reached` of them did); seconds and flops likewise."""

    key: str
    runs: list[SeedRun]
    curve: list[tuple[float, float]]
    bands: list[tuple[float, float] | None]
    at_budget: Interval
    best: float  # of the mean curve
    reached: int
    cost: Interval | None
    seconds: float | None
    flops: float | None

    @property
    def name(self) -> str:
        return NAMES.get(self.key, self.key)


@dataclass(frozen=True)
class Ratio:
    """How many times the tokens of `method` the baseline needs; `at_least`: the baseline never got
    there, so its whole budget is what is known. paired: seeds compared with their like."""

    method: str
    value: float
    low: float | None
    high: float | None
    at_least: bool
    paired: bool


@dataclass(frozen=True)
class Comparison:
    """What the page and comparison.json say."""

    methods: list[Method]
    budget: float
    target: float
    target_from: str
    baseline: str
    ratios: list[Ratio]
    notes: list[str]

    def record(self) -> dict[str, Any]:
        """For comparison.json."""
        return {
            "budget": self.budget,
            "target": self.target,
            "target_from": self.target_from,
            "baseline": self.baseline,
            "confidence": CONFIDENCE,
            "methods": {
                method.key: {
                    "runs": [str(run.path) for run in method.runs],
                    "seeds": [run.seed for run in method.runs],
                    "curve": method.curve,
                    "bands": method.bands,
                    "accuracy_at_budget": vars(method.at_budget),
                    "best": method.best,
                    "reached": method.reached,
                    "tokens_to_target": vars(method.cost) if method.cost else None,
                    "tokens_to_target_by_seed": [run.reaches(self.target) for run in method.runs],
                    "seconds_to_target": method.seconds,
                    "flops_to_target": method.flops,
                }
                for method in self.methods
            },
            "ratios": [vars(ratio) for ratio in self.ratios],
            "notes": self.notes,
        }


def compare(
    directories: Sequence[Path], target: float | None = None, baseline: str | None = None
) -> Comparison:
    """Compares the runs in these directories (of `opsd train` or quickstarts), seeds by method.

    target: an accuracy; by default the best that every seed of the baseline reaches, so that its
    cost is known for all of them. baseline: the method that the others are compared with; by
    default grpo, or else the last of opsd, grpo, sft, ... there is. Raises UserError.
    """
    if target is not None and not 0 < target <= 1:
        raise UserError(f"--target is {target}: it must be an accuracy above 0 and at most 1")
    if len({path.resolve() for path in directories}) != len(directories):
        raise UserError("RUN_DIR: a directory is named twice; its run would count as two seeds")
    runs = [run for directory in directories for run in read_runs(directory)]
    found = sorted({run.method for run in runs}, key=lambda m: (_rank(m), m))
    if baseline is None:
        baseline = "grpo" if "grpo" in found else found[-1]
    if baseline not in found:
        raise UserError(f"--baseline is {baseline!r}: the runs have {', '.join(found)}")
    budget = min(run.budget for run in runs)
    if budget <= 0:
        raise UserError("RUN_DIR: a run has no evaluation after its start, so no curve")
    groups = {method: [run for run in runs if run.method == method] for method in found}
    target_from = "given"
    if target is None:
        target = min(max(y for _, y in run.curve) for run in groups[baseline])
        every = "every seed" if len(groups[baseline]) > 1 else "the run"
        target_from = f"the best that {every} of {NAMES.get(baseline, baseline)} reaches"
    methods = [_method(key, group, budget, target) for key, group in groups.items()]
    notes, ratios = _notes(runs, groups), []
    if any(run.reaches(target) == 0 for run in runs):
        notes.append(
            f"The target, {100 * target:.1f} %, is reached before any training: no ratio says "
            "anything (choose a higher --target)."
        )
    else:
        ratios = [
            ratio(method.key, method.runs, groups[baseline], target)
            for method in methods
            if method.key != baseline and method.reached == len(method.runs)
        ]
    return Comparison(methods, budget, target, target_from, baseline, ratios, notes)


# --- reading ------------------------------------------------------------------------------------


def read_runs(directory: Path) -> list[SeedRun]:
    """The finished runs of a directory; UserError where there is none with a curve."""
    results = read_results(directory)
    runs = []
    for run in results.methods:
        path = directory / run.method if results.quickstart else directory
        if len(run.points) < 2:
            raise UserError(
                f"RUN_DIR: {path} has {len(run.points)} evaluations of the student; a curve needs "
                "two or more (eval.every)"
            )
        runs.append(_seed_run(path, run, results.summary))
    return runs


def _seed_run(path: Path, run: Run, summary: Record) -> SeedRun:
    from opsd.costs import run_flops

    config = _config(path)
    axis = "trained_tokens" if run.trained_axis else "generated_tokens"
    seed = value(config.get("train"), "seed")
    seed = value(summary, "seed") if seed is None else seed
    seconds = [
        (value(record, axis), value(record, "seconds"))
        for record in run.metrics
        if value(record, axis) is not None and value(record, "seconds") is not None
    ]
    flops, prompts_counted = run_flops(path, run, config)
    known = [value(record, "problems") for record in run.evaluations]
    return SeedRun(
        path,
        run.method,
        None if seed is None else int(seed),
        [(point.x, point.accuracy.value) for point in run.points],
        [
            None if point.accuracy.low is None else (point.accuracy.low, point.accuracy.high)
            for point in run.points
        ],
        [(0.0, 0.0), *sorted(seconds)],
        flops,
        prompts_counted,
        run.trained_axis,
        int(known[0]) if known and known[0] else None,
    )


def _config(path: Path) -> Record:
    import yaml

    try:
        found = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


# --- statistics ---------------------------------------------------------------------------------


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """The piecewise linear curve through `points` (by x) at x; beyond the ends, their values."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
    return points[-1][1]


def over_seeds(values: Sequence[float]) -> Interval:
    """Student's interval for the mean of the seeds' values."""
    if len(values) < 2:
        return Interval(values[0])
    reach = student_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * stdev(values)
    reach /= math.sqrt(len(values))
    return Interval(fmean(values), fmean(values) - reach, fmean(values) + reach)


def ratio(method: str, runs: Sequence[SeedRun], others: Sequence[SeedRun], target: float) -> Ratio:
    """Tokens of `others` (the baseline) over tokens of `runs` to `target`, which all `runs` reach.

    The interval is Student's on the logarithms, paired where both have the same seeds, else
    Welch's. Where a run of the baseline never gets there its budget stands in, and the ratio is a
    lower bound without an interval.
    """
    ours = {run.seed: math.log(max(1.0, run.reaches(target))) for run in runs}
    logs = [math.log(max(1.0, run.reaches(target))) for run in runs]
    found = [run.reaches(target) for run in others]
    their_logs = [
        math.log(max(1.0, run.budget if tokens is None else tokens))
        for run, tokens in zip(others, found, strict=True)
    ]
    mean = fmean(their_logs) - fmean(logs)
    if None in found:
        return Ratio(method, math.exp(mean), None, None, True, False)
    seeds = [run.seed for run in others]
    paired = None not in seeds and len(set(seeds)) == len(seeds) and set(seeds) == set(ours)
    paired = paired and len(ours) == len(runs)
    if paired and len(seeds) > 1:
        interval = over_seeds(
            [theirs - ours[seed] for seed, theirs in zip(seeds, their_logs, strict=True)]
        )
    elif min(len(logs), len(their_logs)) > 1:
        interval = _welch(their_logs, logs)
    else:
        return Ratio(method, math.exp(mean), None, None, False, False)
    low, high = math.exp(interval.low), math.exp(interval.high)
    return Ratio(method, math.exp(mean), low, high, False, paired)


def _welch(ones: Sequence[float], others: Sequence[float]) -> Interval:
    mean = fmean(ones) - fmean(others)
    parts = [stdev(side) ** 2 / len(side) for side in (ones, others)]
    if sum(parts) == 0:
        return Interval(mean, mean, mean)
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(side) - 1) for part, side in zip(parts, (ones, others), strict=True)
    )
    reach = student_quantile((1 + CONFIDENCE) / 2, int(freedom)) * math.sqrt(sum(parts))
    return Interval(mean, mean - reach, mean + reach)


def _mean_curve(
    runs: Sequence[SeedRun],
) -> tuple[list[tuple[float, float]], list[tuple[float, float] | None]]:
    """The seeds' mean as far as all of them go, with its bands; one seed's own curve and bands."""
    if len(runs) == 1:
        return runs[0].curve, runs[0].bands
    end = min(run.budget for run in runs)
    own = {x for run in runs for x, _ in run.curve if x <= end}
    xs = sorted(own) if len(own) <= GRID else [end * i / (GRID - 1) for i in range(GRID)]
    curve, bands = [], []
    for x in xs:
        interval = over_seeds([interpolate(run.curve, x) for run in runs])
        curve.append((x, interval.value))
        bands.append((max(0.0, interval.low), min(1.0, interval.high)))
    return curve, bands


def _method(key: str, runs: list[SeedRun], budget: float, target: float) -> Method:
    curve, bands = _mean_curve(runs)
    at_budget = over_seeds([interpolate(run.curve, budget) for run in runs])
    tokens = [run.reaches(target) for run in runs]
    reached = [(run, x) for run, x in zip(runs, tokens, strict=True) if x is not None]
    cost = seconds = flops = None
    if len(reached) == len(runs):
        logs = over_seeds([math.log(max(1.0, x)) for x in tokens])
        ends = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
        cost = Interval(math.exp(logs.value), *ends)
        if all(len(run.seconds) > 1 for run in runs):
            seconds = fmean(interpolate(run.seconds, x) for run, x in reached)
        if all(run.flops for run in runs):
            flops = fmean(run.flops * x / run.budget for run, x in reached)
    return Method(
        key,
        runs,
        curve,
        bands,
        at_budget,
        max(y for _, y in curve),
        len(reached),
        cost,
        seconds,
        flops,
    )


def _notes(runs: Sequence[SeedRun], groups: dict[str, list[SeedRun]]) -> list[str]:
    notes = []
    single = [NAMES.get(key, key) for key, group in groups.items() if len(group) == 1]
    if single:
        notes.append(
            f"One seed of {', '.join(single)}: nothing here says how another seed would do. Bands "
            "of a single run are 95 % Wilson intervals over problems."
        )
    counts = {run.problems for run in runs if run.problems}
    if len(counts) > 1:
        shown = ", ".join(map(str, sorted(counts)))
        notes.append(f"The runs were evaluated on different numbers of problems: {shown}.")
    if any(run.trained_axis for run in runs) and not all(run.trained_axis for run in runs):
        notes.append("SFT generates nothing: its tokens are those it was trained on.")
    if any(run.flops is not None and not run.prompts_counted for run in runs):
        notes.append("FLOPs of some runs leave the prompts out: they could not be read back.")
    budgets = {key: min(run.budget for run in group) for key, group in groups.items()}
    if max(budgets.values()) > 1.05 * min(budgets.values()):
        notes.append("The runs do not end at the same number of tokens; the smallest is compared.")
    return notes


def _rank(method: str) -> int:
    return ORDER.index(method) if method in ORDER else len(ORDER)


def to_json(comparison: Comparison) -> str:
    """comparison.json's text."""
    return json.dumps(comparison.record(), indent=2) + "\n"
