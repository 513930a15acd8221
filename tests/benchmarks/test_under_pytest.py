"""`pytest benchmarks --benchmark-only`: what pytest-benchmark is handed, and the headline."""

from types import SimpleNamespace

import pytest

from benchmarks import kernels_test
from benchmarks.conftest import headline
from benchmarks.measure import measure
from benchmarks.problem import Case
from benchmarks.suite import Row

ROW = Row(Case(8, 70, 6))


class Benchmark(SimpleNamespace):
    """In pytest-benchmark's place."""

    def pedantic(self, function, args, **how):
        self.result = function(*args)


@pytest.fixture(scope="module")
def measured():
    found = kernels_test._candidates(ROW, "cpu", "dense,trl")[0]
    return measure(ROW.case, "cpu", found, 2)


def test_each_is_timed_and_told_beside_ours(measured):
    benchmark = Benchmark(extra_info={})
    kernels_test.test_forward_and_backward(ROW, "dense", "cpu", benchmark, lambda row: measured)
    assert benchmark.group == ROW.case.label and float(benchmark.result.loss) > 0
    least = {name: times["min"] for name, times in measured["seconds"].items()}
    assert benchmark.extra_info["times_ours"] == least["dense"] / least["ours"]
    assert set(benchmark.extra_info) == {"times_ours", "times_gemms", "peak_bytes"}
    assert f"dense {least['dense'] / least['ours']:.2f}, trl " in headline(measured)


def test_what_disagrees_is_no_time(measured):
    wrong = measured | {"red": {"trl": "differs by 1e-1 in dh from ours"}}
    with pytest.raises(AssertionError, match="differs by 1e-1"):
        kernels_test.test_forward_and_backward(ROW, "dense", "cpu", Benchmark(), lambda row: wrong)
