"""Compute how many times as many tokens the baseline needs as a method to reach a target accuracy.

Runs start from accuracies that differ more between seeds than between methods (from 7 to 69 % in
the tiny quickstart). So, where possible, each seed has its own target, the best accuracy of the
baseline's run with that seed, and each run is compared with the baseline's run of the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

from opsd.common.statistics import student_quantile

CONFIDENCE = 0.90
MEASURES = ("tokens", "seconds", "flops")


@dataclass(frozen=True)
class Interval:
    """A mean with its 90 % interval over seeds; a single seed has no interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Target:
    """The accuracy that runs should reach.

    says: its description. shared: the target of all runs; if None, by_seed maps seeds to targets,
    and flat lists the seeds without one, since the baseline's best is no better than what a run of
    that seed starts from.
    """

    says: str
    shared: float | None = None
    by_seed: Mapping[int | None, float] = field(default_factory=dict)
    flat: Sequence[int | None] = ()

    def of(self, run: SeedRun) -> float | None:
        """The target of this run; None if its seed has none."""
        return self.by_seed.get(run.seed) if self.shared is None else self.shared


@dataclass(frozen=True)
class Ratio:
    """What the baseline spends to reach the target ÷ what `method` spends.

    of: what is spent, "tokens", "seconds" or "flops". value: None if no seed is left. at_least: a
    run of the baseline never reached the target, so `value` is a lower bound. paired: each run is
    compared with the baseline's run of the same seed. seeds: those that the ratio includes.
    unreached: those left out because the method did not reach their target.
    """

    method: str
    of: str
    value: float | None
    low: float | None = None
    high: float | None = None
    at_least: bool = False
    paired: bool = True
    seeds: Sequence[int | None] = ()
    unreached: Sequence[int | None] = ()


def alike(runs: Sequence[SeedRun], others: Sequence[SeedRun]) -> bool:
    """Whether both sides have the same seeds, all known and none twice."""
    ours, theirs = ([run.seed for run in side] for side in (runs, others))
    return None not in ours and len(set(ours)) == len(ours) and sorted(ours) == sorted(theirs)


def own_targets(groups: Mapping[str, Sequence[SeedRun]], baseline: str, name: str) -> Target:
    """The target of each seed: the baseline's best. All groups must have the same seeds."""
    starts: dict[int | None, float] = {}
    for run in (run for group in groups.values() for run in group):
        starts[run.seed] = max(run.curve[0][1], starts.get(run.seed, 0.0))
    best = {run.seed: max(y for _, y in run.curve) for run in groups[baseline]}
    return Target(
        f"the best that {name} reaches, seed by seed",
        by_seed={seed: y for seed, y in best.items() if y > starts[seed]},
        flat=[seed for seed, y in best.items() if y <= starts[seed]],
    )


def ratio(
    method: str,
    runs: Sequence[SeedRun],
    others: Sequence[SeedRun],
    target: Target,
    of: str = "tokens",
) -> Ratio:
    """What `others` (the baseline) spend to reach the target ÷ what `runs` spend.

    Logarithms are averaged. The interval is Student's, of the differences within pairs, if both
    sides have the same seeds, and Welch's otherwise. A run of the baseline that never reaches the
    target counts with all it spent; the ratio is then a lower bound without an interval.
    """
    found = [(run, run.reaches(target.of(run))) for run in runs if target.of(run) is not None]
    unreached = [run.seed for run, tokens in found if tokens is None]
    ours = [(run, math.log(run.spent(of, x))) for run, x in found if x is not None]
    seeds = [run.seed for run, _ in ours]
    paired = alike(runs, others)
    theirs, at_least = [], False
    for run in others:
        if target.of(run) is None or (paired and run.seed not in seeds):
            continue
        tokens = run.reaches(target.of(run))
        at_least = at_least or tokens is None
        theirs.append((run, math.log(run.spent(of, run.budget if tokens is None else tokens))))
    if not ours or not theirs or (unreached and not paired):
        return Ratio(method, of, None, paired=paired, unreached=unreached)
    logs, their_logs = [x for _, x in ours], [x for _, x in theirs]
    interval = Interval(fmean(their_logs) - fmean(logs))
    if paired and not at_least:
        of_seed = {run.seed: x for run, x in theirs}
        interval = over_seeds([of_seed[run.seed] - x for run, x in ours])
    elif not at_least and min(len(logs), len(their_logs)) > 1:
        interval = _welch(their_logs, logs)
    low, high = (None if x is None else math.exp(x) for x in (interval.low, interval.high))
    value = math.exp(interval.value)
    return Ratio(method, of, value, low, high, at_least, paired, seeds, unreached)


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """The piecewise linear curve through `points`, sorted by x, at x; constant beyond its ends."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
    return points[-1][1]


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean of the seeds' values, with Student's interval."""
    if len(values) < 2:
        return Interval(values[0])
    reach = student_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * stdev(values)
    reach /= math.sqrt(len(values))
    return Interval(fmean(values), fmean(values) - reach, fmean(values) + reach)


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


@dataclass(frozen=True)
class SeedRun:
    """A finished run: its curve of (tokens, accuracy), and the cost of its tokens.

    bands: intervals over problems. seconds: (tokens, seconds since the start) of each step. flops:
    of the whole run, None if the model's size is unknown. prompts_counted: whether they include the
    prompts'. trained_axis: tokens are trained ones (sft)."""

    path: Path
    method: str  # or its directory's name: see `opsd.compare.comparison.compare`
    name: str  # of the method, as it is shown
    seed: int | None
    curve: list[tuple[float, float]]
    bands: list[tuple[float, float] | None]
    seconds: list[tuple[float, float]]
    flops: float | None
    prompts_counted: bool
    trained_axis: bool
    problems: int | None
    troubles: Sequence[str] = ()  # messages on files that could not be read

    @property
    def budget(self) -> float:
        """The number of tokens at the last evaluation."""
        return self.curve[-1][0]

    def reaches(self, target: float) -> float | None:
        """The tokens at which the curve first reaches `target`; None if it never does."""
        previous = self.curve[0]
        if previous[1] >= target:
            return previous[0]
        for point in self.curve[1:]:
            if point[1] >= target:
                share = (target - previous[1]) / (point[1] - previous[1])
                return previous[0] + share * (point[0] - previous[0])
            previous = point
        return None

    def spent(self, of: str, tokens: float) -> float:
        """Tokens, seconds or flops spent up to `tokens`; above 0, for its logarithm is taken."""
        if of == "tokens":
            return max(1.0, tokens)
        if of == "seconds":
            return max(1e-6, interpolate(self.seconds, tokens))
        return max(1.0, self.flops * tokens / self.budget)

    def knows(self, of: str) -> bool:
        """Whether `spent` can be computed."""
        if of == "seconds":
            return len(self.seconds) > 1
        return of == "tokens" or bool(self.flops)
