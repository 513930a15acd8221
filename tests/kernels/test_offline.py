"""What can be known of the GPU kernels without a GPU: they compile, and fit an SM."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opsd_kernels import resolve
from opsd_kernels.tiles import cuda

OFFLINE = Path(__file__).parent / "offline.py"


@pytest.fixture(scope="module")
def compiled_triton(tmp_path_factory) -> dict:
    """What offline.py reports: in a process of its own, since here Triton interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    out = subprocess.run(
        [sys.executable, str(OFFLINE), "--most-used"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return json.loads(out)


def test_triton_compiles_for_hopper_without_spills(compiled_triton):
    kernels = compiled_triton["kernels"]
    assert {k["name"] for k in kernels} == {
        *("normalisers", "merge", "add", "sums", "gradient", "target", "log_prob_gradient")
    }
    for kernel in kernels:
        assert kernel["local_bytes"] == kernel["stack_bytes"] == 0, kernel
        # Three programs of 128 threads on each quarter of an SM's 65536 registers, at the least.
        assert 0 < kernel["registers"] <= 168 and kernel["shared_bytes"] <= 1024, kernel


def test_cuda_compiled_without_spills():
    """In the library that setup.py built, for every architecture."""
    if not cuda.LIBRARY.exists():
        assert "OPSD_CUDA=1 pip install" in cuda.unusable_because()
        return
    usage = resource_usage(cuda.LIBRARY)
    assert {gpu for gpu, *_ in usage} == {"sm_80", "sm_90a", "sm_100"}
    assert len(usage) == 3 * 38
    for gpu, name, registers, stack, local in usage:
        # Four blocks of 256 threads on an SM's 65536 registers, at the least.
        assert 0 < registers <= 64 and stack == local == 0, (gpu, name, registers, stack, local)


def resource_usage(library: Path) -> list[tuple[str, str, int, int, int]]:
    """(architecture, kernel, registers, bytes of stack, bytes of spills) of each kernel."""
    import triton  # brings the tool

    out = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found, gpu = [], ""
    for line in out.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            gpu = match[1]
        elif match := re.search(r"Function (\w+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", line):
            found.append((gpu, name, *map(int, match.groups())))
    return found


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="has a CUDA device")
def test_without_a_driver(monkeypatch):
    """The library loads, and a call says what is wrong."""
    if not cuda.LIBRARY.exists():
        return
    assert cuda.unusable_because() is None
    monkeypatch.setattr(cuda, "_queue", lambda device: (0, None))
    monkeypatch.setattr(resolve, "resolve", lambda *_: "cuda")
    tile = torch.zeros(2, 3)
    from opsd_kernels import LogitTransform
    from opsd_kernels.tiles import state as states

    state = states.new(2, tile, torch.float32)
    with pytest.raises(RuntimeError, match="normalisers did not start on cpu: CUDA driver"):
        cuda.normalisers(tile, tile, None, None, LogitTransform(), state)
