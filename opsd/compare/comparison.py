"""Compare finished runs of several methods and seeds: their accuracy at an equal budget of tokens,
and the cost of reaching a target accuracy.

Reads run directories as the report does. Needs no torch."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from opsd.common.errors import UserError
from opsd.compare.ratios import (
    CONFIDENCE,
    MEASURES,
    Interval,
    Ratio,
    SeedRun,
    Target,
    alike,
    interpolate,
    over_seeds,
    own_targets,
    ratio,
)
from opsd.runs.read import ORDER, Results, Run, read_results

GRID = 60  # most points of a mean curve


@dataclass(frozen=True)
class Method:
    """A method's results over all its seeds.

    asked: how many of its runs have a target. reached: how many of these reach it. Unless all do,
    tokens_to_target, seconds_to_target and flops_to_target are None.
    """

    key: str
    runs: list[SeedRun]
    curve: list[tuple[float, float]]
    bands: list[tuple[float, float] | None]
    accuracy_at_budget: Interval
    gain_at_budget: Interval  # accuracy at the budget minus accuracy at the start, seed by seed
    asked: int
    reached: int
    tokens_to_target: Interval | None
    seconds_to_target: float | None
    flops_to_target: float | None

    @property
    def name(self) -> str:
        return self.runs[0].name

    @property
    def best(self) -> float:
        """The highest point of the mean curve."""
        return max(y for _, y in self.curve)


@dataclass(frozen=True)
class Comparison:
    """A comparison's results, which the page and comparison.json show."""

    methods: list[Method]
    budget: float
    target: Target
    baseline: str
    ratios: list[Ratio]
    notes: list[str]

    def record(self) -> dict[str, Any]:
        """The content of comparison.json."""
        methods = {
            method.key: {
                **asdict(method),
                "best": method.best,
                "runs": [self._run(run) for run in method.runs],
            }
            for method in self.methods
        }
        return {**asdict(self), "confidence": CONFIDENCE, "methods": methods}

    def _run(self, run: SeedRun) -> dict[str, Any]:
        target = self.target.of(run)
        return {
            "path": str(run.path),
            "seed": run.seed,
            "curve": run.curve,
            "tokens_to_target": None if target is None else run.reaches(target),
            "seconds": run.seconds[-1][1] if run.knows("seconds") else None,
            "flops": run.flops,
        }


def compare(
    directories: Sequence[Path], target: float | None = None, baseline: str | None = None
) -> Comparison:
    """Compare the runs in these directories, of `opsd train` or `opsd quickstart`, by method; by
    name, where two settings of a method have the same seeds.

    target: an accuracy. By default each seed has its own target, the best accuracy of the
    baseline's run with that seed; if the methods have different seeds, it is the best that every
    run of the baseline reaches. baseline: the method that the others are compared with; by default
    grpo or, without it, the last one found in the order opsd, grpo, sft, ... Raises UserError.
    """
    if target is not None and not 0 < target <= 1:
        raise UserError(f"--target is {target}: it must be an accuracy above 0 and at most 1")
    if len({path.resolve() for path in directories}) != len(directories):
        raise UserError("RUN_DIR: a directory is named twice; its run would count as two seeds")
    runs = _told_apart([run for directory in directories for run in read_runs(directory)])
    found = list(dict.fromkeys(run.method for run in runs))
    if baseline is None:
        baseline = "grpo" if "grpo" in found else found[-1]
    if baseline not in found:
        raise UserError(f"--baseline is {baseline!r}: the runs have {', '.join(found)}")
    budget = min(run.budget for run in runs)
    if budget <= 0:
        raise UserError("RUN_DIR: a run has no evaluation after its start, so no curve")
    groups = {method: [run for run in runs if run.method == method] for method in found}
    aim = _target(groups, baseline, target)
    methods = [_method(key, group, budget, aim) for key, group in groups.items()]
    notes, ratios = _notes(runs, groups), []
    if aim.shared is not None and any(run.reaches(aim.shared) == 0 for run in runs):
        notes.append(
            f"The target, {100 * aim.shared:.1f} %, is reached before any training: no ratio says "
            "anything (choose a higher --target)."
        )
    else:
        ratios = [
            ratio(key, group, groups[baseline], aim, of)
            for key, group in groups.items()
            for of in MEASURES
            if key != baseline and all(run.knows(of) for run in (*group, *groups[baseline]))
        ]
    notes += _left_out(aim, groups, baseline, ratios)
    return Comparison(methods, budget, aim, baseline, ratios, notes)


def _told_apart(runs: Sequence[SeedRun]) -> list[SeedRun]:
    """The runs by method. Where a method has a seed twice, its runs differ by more than the seed:
    each gets, for its method, its directory's name without the seed."""
    seeds = Counter((run.method, run.seed) for run in runs if run.seed is not None)
    twice = {method for (method, _), count in seeds.items() if count > 1}
    above = os.path.commonpath([run.path.resolve().parent for run in runs])
    named = []
    for run in sorted(runs, key=lambda run: ((*ORDER, run.method).index(run.method), run.method)):
        name, marked = str(run.path.resolve().relative_to(above)), rf"seed[-_]?{run.seed}\b"
        seed = marked if re.search(marked, name) else rf"{run.seed}\b"  # lr-1-1: of lr-1's
        name = re.sub(rf"(.*)(^|[-_/]){seed}", r"\1", name).strip("/")
        named.append(replace(run, method=name, name=name) if run.method in twice else run)
    if len({(run.method, run.path if run.seed is None else run.seed) for run in named}) < len(runs):
        raise UserError("RUN_DIR: two runs have the same method, seed and name: rename one")
    return named


def _target(groups: dict[str, list[SeedRun]], baseline: str, given: float | None) -> Target:
    if given is not None:
        return Target("given", given)
    runs, name = groups[baseline], groups[baseline][0].name
    if all(alike(group, runs) for group in groups.values()):
        return own_targets(groups, baseline, name)
    every = "every seed" if len(runs) > 1 else "the run"
    best = min(max(y for _, y in run.curve) for run in runs)
    return Target(f"the best that {every} of {name} reaches", best)


# --- reading ------------------------------------------------------------------------------------


def read_runs(directory: Path) -> list[SeedRun]:
    """Read the runs in a directory. Raises UserError for a run of fewer than two evaluations."""
    results = read_results(directory)
    runs = []
    for run in results.methods:
        path = directory / run.method if results.quickstart else directory
        if len(run.points) < 2:
            why = "eval.problems was 0" if run.summary else "it has not ended; --resume goes on"
            why = results.troubles[0] if results.troubles else why
            said = f"has fewer than two evaluations, so no curve: {why}, or leave it out"
            raise UserError(f"RUN_DIR: {path} {said}")
        runs.append(_seed_run(path, run, results))
    return runs


def _seed_run(path: Path, run: Run, results: Results) -> SeedRun:
    from opsd.compare.flops import run_flops

    axis = "trained_tokens" if run.trained_axis else "generated_tokens"
    seed = (run.config.get("train") or {}).get("seed", results.summary.get("seed"))
    pairs = [(record.get(axis), record.get("seconds")) for record in run.metrics]
    seconds = [(x, y) for x, y in pairs if x is not None and y is not None]
    flops, prompts_counted = run_flops(path, run)
    rates = [point.accuracy for point in run.points]
    return SeedRun(
        path=path,
        method=run.method,
        name=run.name,
        seed=seed,
        curve=[(point.x, point.accuracy.value) for point in run.points],
        bands=[None if rate.low is None else (rate.low, rate.high) for rate in rates],
        seconds=[(0.0, 0.0), *sorted(seconds)],
        flops=flops,
        prompts_counted=prompts_counted,
        trained_axis=run.trained_axis,
        troubles=results.troubles,
        problems=run.evaluations[0].get("problems") if run.evaluations else None,
    )


# --- statistics ---------------------------------------------------------------------------------


def _mean_curve(
    runs: Sequence[SeedRun],
) -> tuple[list[tuple[float, float]], list[tuple[float, float] | None]]:
    """The mean curve over seeds, up to the end of the shortest run, with intervals over seeds.

    A single run's curve is returned as it is, with its intervals over problems.
    """
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


def _method(key: str, runs: list[SeedRun], budget: float, target: Target) -> Method:
    curve, bands = _mean_curve(runs)
    at_budget = [interpolate(run.curve, budget) for run in runs]
    gains = [end - run.curve[0][1] for run, end in zip(runs, at_budget, strict=True)]
    asked = [(run, run.reaches(target.of(run))) for run in runs if target.of(run) is not None]
    reached = [(run, tokens) for run, tokens in asked if tokens is not None]
    cost = seconds = flops = None
    if reached and len(reached) == len(asked):
        logs = over_seeds([math.log(run.spent("tokens", x)) for run, x in reached])
        ends = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
        cost = Interval(math.exp(logs.value), *ends)
        seconds, flops = (
            fmean(run.spent(of, x) for run, x in reached)
            if all(run.knows(of) for run, _ in reached)
            else None
            for of in ("seconds", "flops")
        )
    accuracy, gain, counts = over_seeds(at_budget), over_seeds(gains), (len(asked), len(reached))
    return Method(key, runs, curve, bands, accuracy, gain, *counts, cost, seconds, flops)


def _notes(runs: Sequence[SeedRun], groups: dict[str, list[SeedRun]]) -> list[str]:
    notes = list(dict.fromkeys(said for run in runs for said in run.troubles))
    single = [group[0].name for group in groups.values() if len(group) == 1]
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


def _left_out(
    target: Target, groups: dict[str, list[SeedRun]], baseline: str, ratios: Sequence[Ratio]
) -> list[str]:
    """A sentence on the seeds that no ratio includes, and on those that mostly add noise."""
    notes, name = [], groups[baseline][0].name
    if target.flat:
        notes.append(
            f"{_seeds(target.flat)}: {name} is never better than what was started from, so there "
            "is nothing to reach and no ratio."
        )
    noise = [
        run.seed
        for run in groups[baseline]
        if run.bands[0] is not None and target.by_seed.get(run.seed, 2.0) <= run.bands[0][1]
    ]
    if noise:
        notes.append(
            f"{_seeds(noise)}: the best of {name} is within the 95 % interval (over problems) of "
            "what was started from, so its target is mostly noise."
        )
    for one in ratios:
        if one.of == "tokens" and one.unreached:
            other = groups[one.method][0].name
            flattered = f" Without them the ratio flatters {other}." if one.value else ""
            notes.append(f"{_seeds(one.unreached)}: {other} does not reach the target.{flattered}")
    return notes


def _seeds(seeds: Sequence[int | None]) -> str:
    shown = ", ".join("unknown" if seed is None else str(seed) for seed in seeds)
    return f"Seed {shown}" if len(seeds) == 1 else f"Seeds {shown}"


def to_json(comparison: Comparison) -> str:
    """The text of comparison.json."""
    return json.dumps(comparison.record(), indent=2) + "\n"
