"""Rates and intervals against enumeration, published values and simulation."""

import itertools
import random

import pytest
from scipy import stats

from opsd.common.statistics import (
    Estimate,
    bootstrap,
    majority,
    pass_at_k,
    student_quantile,
    wilson_interval,
)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for c in range(n + 1):
        verdicts = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(verdicts, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_of_many_samples_does_not_overflow():
    assert 0 < pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)


def test_wilson_matches_published_values():
    # Newcombe (1998), table I, method 3: 81/263, 15/148, 0/20, 1/29
    for correct, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson_interval(correct, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_wrong_arguments_are_named():
    for call, name in [
        (lambda: wilson_interval(3, 2), "correct"),
        (lambda: wilson_interval(1, 2, confidence=95), "confidence"),
        (lambda: pass_at_k(4, 1, 5), "k"),
        (lambda: pass_at_k(4, 5, 1), "c"),
        (lambda: bootstrap([]), "rates"),
        (lambda: bootstrap([0.5, 1.5]), "rates"),
    ]:
        with pytest.raises(ValueError, match=name):
            call()


def test_majority_votes():
    assert majority([1, 1, 2], right=1) == 1.0
    assert majority([1, 2, 2, None, None, None], right=1) == 0.0  # no answer is no vote
    assert majority([1, 2], right=1) == 0.5
    assert majority([1, 1, 2, 2, 3, 3], right=3) == pytest.approx(1 / 3)
    assert majority([None, None], right=1) == 0.0
    assert majority([2, 2, 1], right=0) == 0.0  # nobody gave it


def test_wilson_is_scipys_where_scipy_has_it():
    for correct, n in [(0, 7), (1, 1), (3, 8), (81, 263), (299, 300)]:
        low, high = stats.binomtest(correct, n).proportion_ci(method="wilson")
        assert wilson_interval(correct, n) == pytest.approx((low, high), abs=1e-12)


def test_students_quantiles_match_the_tables():
    table = [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (99, 1.9842)]
    for freedom, value in table:
        assert student_quantile(0.975, freedom) == pytest.approx(value, abs=5e-5)


def test_bootstrap_intervals_are_those_that_were_published():
    # Computed by the resampling that scipy's has replaced.
    rates = [0.0, 0.25, 1.0, 0.5, 0.75, 1.0, 0.0, 0.25] * 5
    assert bootstrap(rates, 3) == Estimate(0.46875, 0.34375, 0.59375)


@pytest.mark.parametrize("problems, samples", [(30, 1), (30, 12), (60, 4)])
def test_bootstrap_intervals_cover_the_true_rate(problems, samples):
    draw, hits, trials = random.Random(1), 0, 400
    for trial in range(trials):
        rates = [draw.choice([0.1, 0.4, 0.9]) for _ in range(problems)]
        observed = [sum(draw.random() < rate for _ in range(samples)) / samples for rate in rates]
        estimate = bootstrap(observed, seed=trial)
        hits += estimate.low <= 1.4 / 3 <= estimate.high
        assert estimate.low <= estimate.value <= estimate.high
    assert 0.92 <= hits / trials <= 0.985  # ± 2.7 standard errors around 95 %


def test_bootstrap_without_variation_does_not_claim_certainty():
    assert bootstrap([0.0] * 30) == Estimate(0.0, *wilson_interval(0, 30))
    assert bootstrap([1.0] * 30) == Estimate(1.0, *wilson_interval(30, 30))
    assert bootstrap([0.5]).high - bootstrap([0.5]).low > 0.5
    assert bootstrap([0.1, 0.7, 0.4], seed=3) == bootstrap([0.1, 0.7, 0.4], seed=3)
