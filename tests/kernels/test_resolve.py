"""Which backend serves: no GPU is needed, since `resolve` only looks at its arguments."""

import importlib.metadata
import importlib.util

import pytest
import torch

import opsd_kernels
from opsd_kernels import linear_divergence, resolve
from opsd_kernels.tiles import triton

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


def test_auto(monkeypatch):
    backends = dict(ALL_INSTALLED)
    monkeypatch.setattr(resolve, "_BACKENDS", backends)

    def auto(device, dtype=torch.bfloat16):
        return resolve.resolve("auto", device, dtype)

    assert (auto(CPU), auto(torch.device("mps"))) == ("cpp", "torch")
    assert auto(CPU, torch.float64) == auto(GPU, torch.float64) == "torch"
    for fastest in resolve._FASTEST_FIRST["cuda"]:
        assert auto(GPU) == fastest
        backends[fastest] = f"no {fastest} today"
    with pytest.warns(RuntimeWarning, match=r"slower torch backend, because of .*no triton today"):
        assert auto(GPU) == "torch"


def test_what_triton_needs(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.5.1")
    assert "3.5.1 is too old: must be at least 3.6" in triton.unusable_because()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'opsd[gpu]'" in triton.unusable_because()
