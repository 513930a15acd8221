"""Rates of right answers and how sure of them one may be.

`outcomes` everywhere: for each problem, the verdicts on its k samples. Samples of one problem are
not independent, so intervals count problems, not samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean

Outcomes = Sequence[Sequence[bool]]


def wilson_interval(correct: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (low, high) for `correct` of n independent trials; (0, 1) for n = 0.

    Unlike p +- 1.96 standard errors it stays within [0, 1] and is honest at 0 and n. `correct` may
    be fractional (see average_at_k).
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
    # The ends are exact at 0 and n; only rounding puts them 1e-17 off.
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


def average_at_k(outcomes: Outcomes, confidence: float = 0.95) -> tuple[float, float, float]:
    """(accuracy, low, high): the mean over problems of each one's rate of right samples.

    The interval is Wilson's on the problems' rates. With one sample a problem it is exact in his
    sense; with more it is somewhat too wide, since a rate varies less than a single verdict of the
    same mean.
    """
    rates = _rates(outcomes)
    low, high = wilson_interval(min(math.fsum(rates), len(rates)), len(rates), confidence)
    return fmean(rates), low, high


def mean_pass_at_k(outcomes: Outcomes, k: int) -> float:
    """The mean over problems of pass_at_k."""
    _rates(outcomes)
    return fmean(pass_at_k(len(verdicts), sum(verdicts), k) for verdicts in outcomes)


def _rates(outcomes: Outcomes) -> list[float]:
    if not outcomes or not all(len(verdicts) for verdicts in outcomes):
        raise ValueError("outcomes: needs at least one problem, and at least one sample of each")
    return [sum(verdicts) / len(verdicts) for verdicts in outcomes]
