"""Rates and intervals against enumeration, published values and simulation."""

import itertools
import random

import pytest

from opsd.evaluate.metrics import average_at_k, mean_pass_at_k, pass_at_k, wilson_interval


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


def test_average_at_k_interval_covers_the_true_rate():
    draw, hits, trials = random.Random(0), 0, 400
    for _ in range(trials):
        # Problems differ: half are hard. Counting the 60·4 samples as independent would cover far
        # below 95 %.
        rates = [draw.choice([0.1, 0.9]) for _ in range(60)]
        outcomes = [[draw.random() < rate for _ in range(4)] for rate in rates]
        _, low, high = average_at_k(outcomes)
        hits += low <= 0.5 <= high
    assert hits / trials >= 0.93


def test_averages():
    outcomes = [[True, False], [True, True], [False, False]]
    accuracy, low, high = average_at_k(outcomes)
    assert accuracy == pytest.approx(0.5)
    assert (low, high) == wilson_interval(1.5, 3)
    assert mean_pass_at_k(outcomes, 1) == pytest.approx(0.5)
    assert mean_pass_at_k(outcomes, 2) == pytest.approx(2 / 3)
    # thirds do not add up to a float above n
    assert average_at_k([[True] * 3] * 10)[0] == 1.0


def test_wrong_arguments_are_named():
    for call, name in [
        (lambda: wilson_interval(3, 2), "correct"),
        (lambda: wilson_interval(1, 2, confidence=95), "confidence"),
        (lambda: pass_at_k(4, 1, 5), "k"),
        (lambda: pass_at_k(4, 5, 1), "c"),
        (lambda: average_at_k([]), "outcomes"),
        (lambda: average_at_k([[True], []]), "outcomes"),
        (lambda: mean_pass_at_k([[True]], 2), "k"),
    ]:
        with pytest.raises(ValueError, match=name):
            call()
