import sys
from pathlib import Path

import pytest
import torch
from helpers.kernel_cases import OnGpu

from opsd_kernels import backends

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
def tensors_where_the_backend_serves(request):
    """A test of a backend or of a device makes its tensors there. With a GPU at hand, a backend of
    its that cannot be used is a failure, not a test that is skipped.
    """
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    backend = parameters.get("backend")
    if isinstance(backend, OnGpu):
        assert backends()[str(backend)] is None, backends()[str(backend)]
    gpu = isinstance(backend, OnGpu) or parameters.get("device") == "cuda"
    with torch.device("cuda" if gpu else "cpu"):
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
