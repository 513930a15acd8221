"""Measures the kernels and their peers with pytest-benchmark: see conftest.py."""

import pytest

from benchmarks import suite
from benchmarks.__main__ import _candidates
from benchmarks.problem import Problem


def pytest_generate_tests(metafunc):
    """A test for each case and candidate that can run here."""
    option = metafunc.config.getoption
    rows = suite.gpu() if option("gpu") else suite.cpu() if option("whole") else suite.quick()
    device = "cuda" if option("gpu") else "cpu"
    both = [(row, name) for row in rows for name in _candidates(row, device, None)[0]]
    ids = [f"{row.case.label}-{name}".replace(" ", "-") for row, name in both]
    metafunc.parametrize("row, name", both, ids=ids)


def test_forward_and_backward(row, name, device, benchmark, interleaved):
    measured = interleaved(row)
    assert not measured["red"]  # as in `python -m benchmarks`, wrong results are not timed
    if name in measured["failed"]:
        pytest.xfail(measured["failed"][name])  # a peer failed
    least = {each: times["min"] for each, times in measured["seconds"].items()}
    benchmark.group = row.case.label
    benchmark.extra_info["times_ours"] = least[name] / least["ours"]
    benchmark.extra_info["times_gemms"] = least[name] / least["gemms"]
    benchmark.extra_info["peak_bytes"] = measured["peak_bytes"].get(name)
    run = _candidates(row, device, None)[0][name]
    problem = Problem.make(row.case, device)
    benchmark.pedantic(run, args=(problem,), rounds=3, warmup_rounds=1)
