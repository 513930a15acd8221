"""`pytest benchmarks --benchmark-only`: the kernels under pytest-benchmark, with its options, its
comparisons and its JSON.

    pip install '.[bench]'
    pytest benchmarks --benchmark-only --benchmark-autosave
    pytest benchmarks --benchmark-only --benchmark-compare --benchmark-compare-fail=min:10%

pytest-benchmark times one candidate after the other, so a slow minute of the machine affects only
one of them. The headline is therefore from the fixture `interleaved`, with the protocol of
measure.py: its ratios to ours are printed last, and are `times_ours` in the JSON's extra_info.
"""

import sys
from pathlib import Path

import pytest
import torch

# At the end, as in tests/conftest.py, so that installed packages are measured.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.__main__ import _candidates
from benchmarks.measure import measure
from benchmarks.suite import Row

ROWS = pytest.StashKey[list[dict]]()


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="the cases of `python -m benchmarks --gpu`")
    parser.addoption("--whole", action="store_true", help="all cases of the CPU's table, not a few")


@pytest.fixture(scope="session")
def device(request) -> str:
    if request.config.getoption("gpu") and not torch.cuda.is_available():
        pytest.exit("--gpu: there is no CUDA device here", returncode=2)
    return "cuda" if request.config.getoption("gpu") else "cpu"


@pytest.fixture(scope="session")
def interleaved(request, device):
    """row → the result of `measure`, with all candidates in turn; measured once for each row."""
    found = {}

    def of(row: Row) -> dict:
        if row not in found:
            run, _ = _candidates(row, device, None)
            found[row] = measure(row.case, device, run, 3) | {"label": row.case.label}
        return found[row]

    request.config.stash[ROWS] = []
    yield of
    request.config.stash[ROWS] = list(found.values())


def pytest_terminal_summary(terminalreporter, config):
    """Print the headline: each candidate's time ÷ ours, measured in turn."""
    for row in config.stash.get(ROWS, []):
        terminalreporter.write_line(f"{row['label']}: {headline(row)}")


def headline(row: dict) -> str:
    """`trl 3.10, dense 1.25 times ours`, from the shortest times."""
    least = {name: times["min"] for name, times in row["seconds"].items()}
    ours = least.pop("ours")
    return ", ".join(f"{name} {t / ours:.2f}" for name, t in least.items()) + " times ours"
