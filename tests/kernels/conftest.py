import sys
from pathlib import Path

import pytest
import torch

# For `benchmarks`, which is not installed. At the end: the installed packages come first.
sys.path.append(str(Path(__file__).parents[2]))


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """torch.empty gives NaN here, so that a read of memory nobody has written fails at once."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
