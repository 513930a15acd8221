"""Which backend serves, and that every compiled variant of the C++ one is right."""

import os
import warnings

import pytest
import torch
from helpers.kernel_cases import KINDS, check, make
from helpers.processor import instruction_sets, using

import opsd_kernels
from benchmarks import machine
from opsd_kernels import Clip, LogitTransform, resolve
from opsd_kernels.divergence import Rule
from opsd_kernels.tiles import c_interface, cpp
from opsd_kernels.tiles import state as states
from opsd_kernels.tiles.logits import Logits

CPU = torch.device("cpu")


def test_the_library_is_built():
    """Everything below would otherwise test torch twice."""
    assert opsd_kernels.backends()["cpp"] is None
    assert instruction_sets("baseline") == ["baseline"]
    assert resolve.resolve("auto", CPU, torch.float32) == "cpp"
    assert resolve.resolve("auto", CPU, torch.float64) == "torch"


def test_backends_says_why():
    reasons = opsd_kernels.backends()
    assert set(reasons) == {"torch", "cpp", "triton", "cuda"}
    reasons["torch"] = "changed"
    assert opsd_kernels.backends()["torch"] is None


def test_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setattr(cpp, "LIBRARY", tmp_path / "libopsd_cpu.so")
    reason = cpp.unusable_because()
    assert "pip install -e ." in reason and "\n" not in reason
    monkeypatch.setitem(resolve._BACKENDS, "cpp", reason)
    with pytest.raises(ValueError, match=r"backend: got .cpp.*pip install -e"):
        resolve.resolve("cpp", CPU, torch.float32)
    with pytest.warns(RuntimeWarning, match="slower torch backend.*pip install -e"):
        assert resolve.resolve("auto", CPU, torch.float32) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # asked for by name: nothing to say
        assert resolve.resolve("torch", CPU, torch.float32) == "torch"


def test_a_broken_library(monkeypatch, tmp_path):
    broken = tmp_path / "libopsd_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(cpp, "LIBRARY", broken)
    cpp._library.cache_clear()
    try:
        assert "does not load" in cpp.unusable_because()
    finally:
        monkeypatch.undo()
        cpp._library.cache_clear()


def test_a_checkout_takes_the_installed_library(monkeypatch, tmp_path):
    """In a source tree in which nothing was built; what is built beside the package comes first."""
    assert c_interface.find_library(cpp.LIBRARY.name) == cpp.LIBRARY
    name = "libof_no_package.so"
    assert not c_interface.find_library(name).exists()
    installed = tmp_path / "site-packages"
    (installed / "opsd_kernels").mkdir(parents=True)
    (installed / "opsd_kernels" / name).write_bytes(b"")
    information = installed / "opsd_train-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Name: opsd-train\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(installed)
    assert c_interface.find_library(name) == installed / "opsd_kernels" / name


def test_benchmarks_measure_no_other_backend(monkeypatch):
    assert machine.describe()["backend"] == ("triton" if torch.cuda.device_count() else "cpp")
    monkeypatch.setitem(resolve._BACKENDS, "cpp", "not built")
    with pytest.warns(RuntimeWarning), pytest.raises(SystemExit, match=r"benchmarks: .*not built"):
        machine.backend("cpu")


def test_a_library_of_other_sources(monkeypatch):
    """One that an earlier checkout built would read our structures as others."""
    monkeypatch.setattr(c_interface, "INTERFACE", c_interface.INTERFACE + 1)
    cpp._library.cache_clear()
    try:
        assert "was built from other sources" in cpp.unusable_because()
    finally:
        monkeypatch.undo()
        cpp._library.cache_clear()


@pytest.mark.parametrize("name", instruction_sets("baseline", "avx2", "avx512"))
@pytest.mark.parametrize("divergence", KINDS)
def test_every_instruction_set(name, divergence):
    with using(name):
        assert cpp.instruction_set() == name
        for clip in (None, Clip("entry", 0.02), Clip("token", 0.3)):
            for softcap in (None, 5.0):
                case = make(
                    6,
                    1043,
                    16,
                    divergence=divergence,
                    clip=clip,
                    bias=True,
                    transform=LogitTransform(0.8, 1.1, softcap),
                )
                check(case, torch.float32, "cpp")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads):
    """Rows are independent: the number of threads must not show in the tile's result."""
    before = torch.get_num_threads()
    tiles = torch.randn(2, 9, 700)
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            s, t = tiles.clone()
            state = states.new(9, s, s.dtype)
            rule = Rule(opsd_kernels.Divergence("jsd"))
            cpp.rows(Logits(s), Logits(t), rule, state, torch.ones(9))
            results.append((s, state))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_after_a_fork():
    """OpenMP's threads die with a fork: the child must not wait for them."""
    case = make(8, 500, 16)
    expected = float(case.fused("cpp").loss)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # torch's own pool does not survive either
        os.write(writer, str(float(case.fused("cpp").loss)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        assert abs(float(answer.read()) - expected) < 1e-6
    os.waitpid(child, 0)
