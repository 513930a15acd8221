"""Shared by all tests: what they need of the installation, said once."""

import os
import sys
from pathlib import Path

# As opsd/cli.py has it, and for its reason; read when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# `pytest -n 2`: a core for each, or all of them start threads for all cores. Read when torch loads.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

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
