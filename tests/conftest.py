"""Shared by all tests: what they need of the installation, said once."""

import gc
import os
import sys
from pathlib import Path

# As opsd/cli/main.py has it, and for its reason; read when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# `pytest -n 2`: a core for each, or all of them start threads for all cores. Read when torch loads.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# `benchmarks` is not installed; at the end of the path, so that the installed packages are tested
# and not the checkout's, which may have no compiled library.
sys.path.append(str(Path(__file__).resolve().parents[1]))

# Before anything imports tokenizers: a fork after its threads started prints a page of advice.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Without a GPU, Triton's kernels run in its interpreter. Read when triton and our backend are
# imported, and so set before everything.
if not torch.cuda.device_count():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Few examples by default; `pytest --hypothesis-profile=thorough` for many.
settings.register_profile("quick", max_examples=60, deadline=None)
settings.register_profile("thorough", max_examples=10_000, deadline=None)
settings.load_profile("quick")


def pytest_addoption(parser):
    """How long tests/attacks goes on; see its conftest.py."""
    group = parser.getgroup("attacks")
    group.addoption("--attacks", type=int, default=5, help="seeds of each kind of attack")
    group.addoption("--first-seed", type=int, default=0, help="the first of those seeds")


# With torch and transformers imported there are more than a million objects, and Python looks
# through all of them for cycles, time and again: a quarter of a short run's time. What collection
# has imported stays to the end, so no search looks at it.
def pytest_configure():
    gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    gc.unfreeze()  # or libraries say at the end what was never freed


def pytest_collection_modifyitems(config, items):
    """The real servers' tests are for who asks for them; without their Python they are skipped."""
    for engine in ("vllm", "sglang"):
        real = [item for item in items if item.get_closest_marker(engine)]
        python = f"OPSD_{engine.upper()}_PYTHON"
        if engine not in config.option.markexpr:
            config.hook.pytest_deselected(items=real)
            items[:] = [item for item in items if item not in real]
        elif not os.environ.get(python):
            for item in real:
                item.add_marker(pytest.mark.skip(reason=f"needs {engine}: set {python}"))


def pytest_runtest_setup(item):
    """A GPU test has the marker `gpu` and no more; without a GPU it is skipped, and counted so."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny random model's directory, and a file of worksheets for it."""
    from helpers.training_cases import write_model, write_rows  # not for the kernels' tests

    directory = tmp_path_factory.mktemp("base")
    return write_model(directory / "model"), write_rows(directory / "rows.jsonl")


@pytest.fixture(scope="module")
def wider(tmp_path_factory):
    """The directory of another model with the same vocabulary, to teach the one of `files`."""
    from helpers.training_cases import write_wider_model

    return write_wider_model(tmp_path_factory.mktemp("wider"))


@pytest.fixture(scope="module")
def student(files):
    """The model of `files` and its tokenizer."""
    from helpers.training_cases import load_student

    return load_student(files)


@pytest.fixture(scope="module")
def contexts(student):
    """Six problems as the student sees them, in tokens."""
    from helpers.training_cases import ROWS, prompts_of

    prompts = prompts_of(student[1])
    return [prompts.ids(row, "student") for row in ROWS[:6]]


@pytest.fixture
def no_report(monkeypatch):
    """Runs without a report, which takes longer than the tests' runs."""
    monkeypatch.setattr("opsd.training.run.write_report", lambda directory: None)
