"""Rates of right answers and their confidence intervals.

Samples of one problem are not independent, so intervals are over problems, not samples. scipy is
imported when it is first needed: that takes half a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

RESAMPLES = 4000


@dataclass(frozen=True)
class Estimate:
    """A rate and its 95 % interval."""

    value: float
    low: float
    high: float


def wilson_interval(correct: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (low, high) for `correct` of n independent trials; (0, 1) for n = 0.

    Unlike p +- 1.96 standard errors it stays within [0, 1] and has a width at 0 and n. `correct`
    may be a fraction, the sum of problems' rates; scipy.stats.binomtest takes integers only.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"correct: {correct!r} is not between 0 and n = {n!r}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: {confidence!r} is not between 0 and 1")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = correct / n
    centre = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At 0 and n the ends are exactly 0 and 1; without this, rounding puts them 1e-17 off.
    low = 0.0 if correct == 0 else (centre - spread) / scale
    high = 1.0 if correct == n else (centre + spread) / scale
    return low, high


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples is right), c of n samples being right.

    1 - C(n-c, k) / C(n, k): the share of k-subsets of the n samples that hold a right one.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k: {k!r} is not between 1 and the number of samples, {n!r}")
    if not 0 <= c <= n:
        raise ValueError(f"c: {c!r} is not between 0 and the number of samples, {n!r}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(votes: Sequence[int | None], right: int) -> float:
    """1 if the most common vote is `right`, else 0; 1/t if `right` ties with t - 1 other answers.

    votes: for each sample, the number of its group of equal answers; None, a sample without an
    answer, does not vote. With no votes at all the majority is wrong.
    """
    counts: dict[int, int] = {}
    for vote in votes:
        if vote is not None:
            counts[vote] = counts.get(vote, 0) + 1
    most = max(counts.values(), default=0)
    return (counts.get(right) == most) / max(1, sum(count == most for count in counts.values()))


def bootstrap(rates: Sequence[float], seed: int = 0, confidence: float = 0.95) -> Estimate:
    """The mean of the problems' rates, with a bootstrap interval over problems.

    rates: one number in [0, 1] per problem. The interval is the expanded percentile bootstrap
    (Hesterberg 2015): with few problems plain percentiles are too narrow, by sqrt((n-1)/n) and
    because they ignore Student's t. If all rates are 0 or all 1, resampling shows no spread: then,
    and for a single problem, it is Wilson's interval.
    """
    n = len(rates)
    if not n or not all(0 <= rate <= 1 for rate in rates):
        raise ValueError("rates: needs at least one problem, and rates between 0 and 1")
    mean = min(fmean(rates), 1.0)
    if n == 1 or mean in (0.0, 1.0):
        return Estimate(mean, *wilson_interval(mean * n, n, confidence))
    import numpy
    from scipy import stats

    expanded = student_quantile((1 + confidence) / 2, n - 1) * math.sqrt(n / (n - 1))
    found = stats.bootstrap(
        (numpy.asarray(rates, dtype=numpy.float64),),
        numpy.mean,
        n_resamples=RESAMPLES,
        batch=max(1, 4_000_000 // n),  # 32 MB of indices at a time
        confidence_level=1 - 2 * stats.norm.sf(expanded),
        method="percentile",
        rng=numpy.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean, float(min(found.low, mean)), float(max(found.high, mean)))


def student_quantile(probability: float, freedom: float) -> float:
    """The quantile of Student's t with `freedom` degrees of freedom."""
    from scipy import stats

    return float(stats.t.ppf(probability, freedom))
