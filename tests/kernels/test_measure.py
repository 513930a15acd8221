"""The benchmark's own promises: it refuses to time what disagrees, and compares like with like."""

import pytest

from benchmarks import candidates
from benchmarks.measure import Disagreement, check_agreement, measure

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_candidates_agree(divergence, trainable):
    found, missing = candidates.peers()
    assert {"ours", "dense"} <= set(found) and set(found) | set(missing) == {"ours", "dense", "trl"}
    check_agreement(candidates.Problem.make(8, 70, 6, divergence, trainable), found)


def test_a_red_comparison_is_not_timed():
    timed = []

    def wrong(problem):
        timed.append(1)
        loss, d_hidden, d_weight = candidates.ours(problem)
        return loss, 1.01 * d_hidden, d_weight

    run = {"ours": candidates.ours, "wrong": wrong}
    with pytest.raises(Disagreement, match=r"wrong and ours differ by 1\.0e-02 in dh"):
        measure(8, 70, 6, "jsd", True, 2, run, candidates.gemms)
    assert len(timed) == 1


def test_a_row_of_the_report():
    run = {"ours": candidates.ours, "dense": candidates.dense}
    row = measure(8, 70, 6, "forward_kl", False, 2, run, candidates.gemms)
    assert set(row["seconds"]) == {"ours", "dense", "gemms"}
    for times in row["seconds"].values():
        assert len(times["all"]) == 2 and times["min"] <= times["median"] <= max(times["all"])
