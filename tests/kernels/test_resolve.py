"""Which backend serves: no GPU is needed, since `resolve` only looks at its arguments."""

import importlib.metadata
import importlib.util
import warnings

import pytest
import torch

import opsd_kernels
from opsd_kernels import linear_divergence, resolve
from opsd_kernels.tiles import cuda, triton

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)
ALL_INSTALLED = dict.fromkeys(("torch", "cpp", "triton", "cuda"))


@pytest.fixture
def no_device(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_device")
def test_without_a_device(monkeypatch):
    monkeypatch.setattr(resolve, "_BACKENDS", ALL_INSTALLED)
    reasons = opsd_kernels.backends()
    assert reasons == {
        "torch": None,
        "cpp": None,
        "triton": "no CUDA device",
        "cuda": "no CUDA device",
    }
    hidden, weight = torch.randn(2, 3), torch.randn(5, 3)
    for name in ("triton", "cuda"):
        with pytest.raises(ValueError, match=f"backend: got '{name}'.*unusable.*no CUDA device"):
            linear_divergence(hidden, hidden, weight, backend=name)


@pytest.mark.usefixtures("capability")
def test_tensors_elsewhere(monkeypatch):
    monkeypatch.setattr(resolve, "_BACKENDS", ALL_INSTALLED)
    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert set(opsd_kernels.backends().values()) == {None}
    for name, device, served in (
        ("triton", CPU, "CUDA devices"),
        ("cuda", CPU, "CUDA devices"),
        ("cpp", GPU, "the CPU"),
        ("triton", torch.device("mps"), "CUDA devices"),
    ):
        with pytest.raises(ValueError, match=f"got '{name}' .* it serves {served} only"):
            resolve.resolve(name, device, torch.float32)
    for name in ("cpp", "triton", "cuda"):
        with pytest.raises(ValueError, match=f"backend: got '{name}' for float64"):
            resolve.resolve(name, CPU if name == "cpp" else GPU, torch.float64)
    monkeypatch.setattr(triton, "INTERPRETED", True)
    assert resolve.resolve("triton", CPU, torch.float32) == "triton"


@pytest.fixture
def capability(monkeypatch):
    """Of every device; a test may set another."""
    found = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found[0])
    return found


def test_old_devices(monkeypatch, capability):
    """A T4 or V100 gets triton; one that is older, torch, with the reasons."""
    monkeypatch.setattr(resolve, "_BACKENDS", dict(ALL_INSTALLED, triton="not installed"))
    assert resolve.resolve("auto", GPU, torch.float32) == "cuda"
    capability[0] = (7, 5)
    with pytest.warns(RuntimeWarning, match=r"'cuda': cuda:1 has compute capability 7\.5.*8\.0"):
        assert resolve.resolve("auto", GPU, torch.float32) == "torch"
    with pytest.raises(ValueError, match=r"got 'cuda'.*capability 7\.5"):
        resolve.resolve("cuda", GPU, torch.float32)
    monkeypatch.setattr(resolve, "_BACKENDS", ALL_INSTALLED)
    assert resolve.resolve("auto", GPU, torch.float32) == "triton"
    capability[0] = (6, 1)
    with pytest.warns(RuntimeWarning, match=r"'triton': cuda:1 has compute capability 6\.1"):
        assert resolve.resolve("auto", GPU, torch.float32) == "torch"


def test_old_drivers():
    for driver, runtime in ((0, 13000), (13020, 13000), (13000, 12040)):
        assert cuda.too_old(driver, runtime) is None
    assert "driver is of CUDA 12.4, and the kernels were built with CUDA 13" in cuda.too_old(
        12040, 13000
    )


@pytest.mark.usefixtures("capability")
def test_auto(monkeypatch):
    backends = dict(ALL_INSTALLED)
    monkeypatch.setattr(resolve, "_BACKENDS", backends)

    def auto(device, dtype=torch.bfloat16):
        return resolve.resolve("auto", device, dtype)

    assert (auto(CPU), auto(torch.device("mps"))) == ("cpp", "torch")
    assert auto(CPU, torch.float64) == auto(GPU, torch.float64) == "torch"
    # Until a benchmark has shown cuda to be faster.
    for fastest in ("triton", "cuda"):
        assert auto(GPU) == fastest
        backends[fastest] = f"no {fastest} today"
    with pytest.warns(RuntimeWarning, match=r"slower torch backend, because of .*no cuda today"):
        assert auto(GPU) == "torch"


@pytest.mark.usefixtures("capability")
def test_the_slow_backend_is_told_once(monkeypatch):
    monkeypatch.setattr(resolve, "_BACKENDS", ALL_INSTALLED | {"cpp": "no compiler, once"})
    told = []
    for _ in range(3):  # as torch and transformers do, which makes Python forget
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resolve.resolve("auto", CPU, torch.bfloat16)
        told += caught
    assert len(told) == 1 and "no compiler, once" in str(told[0].message)


def test_what_triton_needs(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.5.1")
    assert "3.5.1 is too old: must be at least 3.6" in triton.unusable_because()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'opsd-train[gpu]'" in triton.unusable_because()
