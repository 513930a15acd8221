"""Attacks: what a stranger could send, made up from a seed.

Each file here makes one kind of input (templates, terminal text, …) and says what must hold for all
of them. A test that asks for `draw`, a `random.Random`, runs once a seed: `--attacks N` seeds,
starting at `--first-seed`. A failure's name holds its seed: `--attacks 1 --first-seed SEED` runs
that one again.

    pytest tests/attacks --attacks 3000 --first-seed 100000
"""

import random

import pytest


def pytest_generate_tests(metafunc):
    """A test that draws is run for each seed."""
    if "draw" in metafunc.fixturenames:
        option = metafunc.config.getoption
        first, count = option("--first-seed"), option("--attacks")
        metafunc.parametrize("draw", range(first, first + count), indirect=True)


@pytest.fixture
def draw(request) -> random.Random:
    """Where an attack takes its choices from."""
    return random.Random(request.param)
