"""What can be known of the GPU kernels without a GPU: they compile, and fit an SM."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opsd_kernels.divergence import Rule
from opsd_kernels.tiles import cuda
from opsd_kernels.tiles import state as states
from opsd_kernels.tiles.logits import Logits

TARGETS = ("sm_80", "sm_90a", "sm_100", "sm_120")
# Instructions an entry, of a thread that has all of its 16 (docs/gpu-cost.md counts on them), and
# branches (without a soft cap, whose tanh has some).
MOST_INSTRUCTIONS = {
    "normalisers": 21,
    "log_prob_gradient": 19,
    "sumsILi0ELb0": 43,
    "sumsILi1ELb0": 44,
    "sumsILi2ELb0": 92,
    "sumsILi3ELb0": 55,
    "gradientILi0ELNS0_5KnownE0": 26,
    "gradientILi1ELNS0_5KnownE0": 32,
    "gradientILi2ELNS0_5KnownE0": 67,
    "gradientILi3ELNS0_5KnownE0": 54,
    "gradientILi0ELNS0_5KnownE2": 47,
}
# Triton's, without the entry clip; "normalisers" of both roles.
MOST_OF_TRITON = {
    ("normalisers", None, None): 44,
    ("log_prob_gradient", None, None): 21,
    ("sums", 0, None): 44,
    ("sums", 1, None): 44,
    ("sums", 2, None): 123,
    ("sums", 3, None): 71,
    ("gradient", 0, True): 29,
    ("gradient", 1, True): 30,
    ("gradient", 2, True): 90,
    ("gradient", 3, True): 62,
    ("gradient", 0, False): 50,
    ("gradient", 1, False): 50,
    ("gradient", 2, False): 130,
    ("gradient", 3, False): 76,
}
MOST_LOOPED = {0: 64, 1: 64, 2: 115, 3: 79}  # of `rows` without the entry clip, by kind
MOST_BRANCHES = 40
PUBLISHED = Path(__file__).parents[2] / "docs" / "kernels-gpu.json"
OFFLINE = Path(__file__).parents[1] / "helpers" / "offline.py"


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """What offline.py reports: in a process of its own, since here Triton interprets."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("there is no triton for this platform")
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


def test_triton_compiles_without_spills(report):
    names = ("normalisers", "merge", "add", "sums", "gradient", "target", "log_prob_gradient")
    names += ("scale",)
    assert {(k["name"], k["target"]) for k in report["triton"]} == {
        (name, target) for name in names for target in ("sm_80", "sm_90", "sm_100", "sm_120")
    }
    for kernel in report["triton"]:
        assert kernel["spilled_bytes"] == kernel["stack_bytes"] == 0, kernel
        # Three programs of 128 threads on each quarter of an SM's 65536 registers, at the least.
        assert 0 < kernel["registers"] <= 168 and kernel["shared_bytes"] <= 4096, kernel


def test_triton_issues_few_instructions(report):
    found = {
        (k["name"], k.get("KIND"), k.get("SUMS_KNOWN")): k["shortest_way"] / 16
        for k in report["triton"]
        if k["target"] == "sm_90" and not k.get("CLIP")
    }
    assert found.keys() >= MOST_OF_TRITON.keys()
    over = {name: found[name] for name, most in MOST_OF_TRITON.items() if found[name] > most}
    assert not over, over


def test_triton_loads_16_bytes_at_a_time(report):
    """`auto` takes Triton first: a thread's 16 entries of a role are four loads."""
    for kernel in report["triton"]:
        roles = {"normalisers": 2, "sums": 2, "gradient": 2, "log_prob_gradient": 1}
        if roles := roles.get(kernel["name"]):
            assert kernel["loads_128"] == 4 * roles and kernel["loads_32"] <= 8, kernel


def test_cuda_compiled_without_spills(report):
    """In the library that setup.py built, for every architecture."""
    if not cuda.LIBRARY.exists():
        assert "OPSD_CUDA=1 pip install" in cuda.unusable_because()
        return
    targets = [kernel["target"] for kernel in report["cuda"]]
    assert set(targets) == set(TARGETS)
    assert len({targets.count(target) for target in targets}) == 1  # the same kernels in each
    for kernel in report["cuda"]:
        assert kernel["spilled_bytes"] == kernel["stack_bytes"] == 0, kernel
        # Two blocks of 256 threads on an SM's 65536 registers, at the least.
        assert 0 < kernel["registers"] <= 128 and kernel["shared_bytes"] <= 2048, kernel


def test_cuda_loads_16_bytes_at_a_time(report):
    """A thread's 16 entries of a role are four loads where the row is aligned, and its bias too."""
    if not cuda.LIBRARY.exists():
        return
    seen = set()
    for kernel in report["cuda_code"]:
        name = next((n for n in MOST_INSTRUCTIONS if kernel["name"].startswith(n)), None)
        if name is None:
            continue
        seen.add((name, kernel["target"]))
        roles = 2 if name.startswith(("sums", "gradient")) else 1
        assert kernel["loads_128"] == 8 * roles, kernel
        if "Lb1EEEv" not in kernel["name"]:  # SOFTCAP, the last parameter
            assert kernel["branches"] <= MOST_BRANCHES, kernel
            assert kernel["shortest_way"] / 16 <= MOST_INSTRUCTIONS[name], kernel
    assert seen == {(name, target) for name in MOST_INSTRUCTIONS for target in TARGETS}


def test_cuda_computes_a_row_at_once(report):
    """Its loops, each of four entries at a time; nothing on sm_80, which has no clusters."""
    if not cuda.LIBRARY.exists():
        return
    seen = 0
    for kernel in report["cuda_code"]:
        if not kernel["name"].startswith("rows"):
            continue
        if kernel["target"] == "sm_80":
            assert kernel["instructions"] < 10, kernel
            continue
        kind, clip, softcap = re.match(r"rowsILi(\d)ELb(\d)ELb(\d)", kernel["name"]).groups()
        if clip == softcap == "0":
            seen += 1
            assert kernel["looped"] / 4 <= MOST_LOOPED[int(kind)], kernel
            assert kernel["copies_128"] == 2, kernel
    assert seen == len(MOST_LOOPED) * (len(TARGETS) - 1)


def test_the_published_counts_are_the_sources(report):
    """docs/gpu-cost.md models with them; where not: python tests/helpers/offline.py > the file."""
    published = json.loads(PUBLISHED.read_text())
    if published["triton_version"] == report["triton_version"]:
        before, now = map(_ways, (published["triton"], report["triton"]))
        assert not {
            k: (before[k], way) for k, way in now.items() if abs(before[k] / way - 1) > 0.02
        }
    if not cuda.LIBRARY.exists():
        return
    published = published["cuda_code"]
    ways = {(k["name"], k["target"]): k["shortest_way"] for k in published}
    found = {(k["name"], k["target"]): k["shortest_way"] for k in report["cuda_code"]}
    assert set(ways) == set(found)
    wrong = {key: (ways[key], way) for key, way in found.items() if abs(ways[key] / way - 1) > 0.02}
    assert not wrong


def _ways(kernels: list[dict]) -> dict[str, int]:
    """Each of Triton's variants' instructions."""
    measures = ("registers", "shared_bytes", "loads_128", "loads_32", "shortest_way")
    names = [str({k: x for k, x in kernel.items() if k not in measures}) for kernel in kernels]
    return dict(zip(names, (kernel["shortest_way"] for kernel in kernels), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="has a CUDA device")
def test_without_a_driver(monkeypatch):
    """The library loads, and a call says what is wrong."""
    if not cuda.LIBRARY.exists():
        assert "not built" in cuda.unusable_because()
        return
    assert cuda.unusable_because() is None
    monkeypatch.setattr(cuda, "_queue", lambda device: (0, None))
    tile = Logits(torch.zeros(2, 3))
    state = states.new(2, tile.product, torch.float32)
    with pytest.raises(RuntimeError, match=r"normalisers did not start on cpu: .*CUDA driver"):
        cuda.normalisers(tile, tile, Rule(), state)
