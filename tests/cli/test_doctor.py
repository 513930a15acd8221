"""The doctor's judgement of machines better and worse than this one."""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from opsd.cli import doctor
from opsd.cli.doctor import Finding, run
from opsd.common.system import memory, processor, usable_cores
from opsd.quickstart import GB


def examine(monkeypatch, *findings):
    monkeypatch.setattr(doctor, "SECTIONS", (("Part", lambda: iter(findings)),))
    lines = []
    return run(None, lines.append), "\n".join(lines)


def test_this_machine_can_train():
    lines = []
    assert run(None, lines.append) == 0
    report = "\n".join(lines)
    import torch

    assert torch.__version__ in report and "torch" in report and "GB" in report
    assert lines[-1].startswith("Training is possible here")


def test_only_fatal_problems_fail(monkeypatch):
    note = Finding("memory", "3 GB", "little", "buy some")
    code, report = examine(monkeypatch, Finding("a", "1"), note, Finding("b", "no", absent=True))
    assert code == 0 and "note: memory: little\n  → buy some" in report
    assert "  ok  a " in report and "  !   memory" in report and "  -   b " in report
    fatal = Finding("torch", "not installed", "needed", "pip install torch", fatal=True)
    code, report = examine(monkeypatch, note, fatal)
    assert code == 1 and "problem: torch: needed\n  → pip install torch" in report
    assert "not possible here yet: 1 to mend" in report


def test_missing_and_old_packages_are_fatal(monkeypatch):
    versions = {name: "9.0" for name in doctor.required()} | {"torch": "2.9.1+cu128", "vllm": "1.0"}
    del versions["math-verify"]
    monkeypatch.setattr(doctor, "_version", versions.get)
    found = {finding.name: finding for finding in doctor.software()}
    fatal = {name for name, finding in found.items() if finding.problem and finding.fatal}
    assert fatal == {"torch", "math-verify"}
    least = doctor.required()["torch"]
    assert found["torch"].advice == f"pip install 'torch>={least}'"
    assert found["peft"].absent and not found["vllm"].absent
    versions["torch"] = f"{least}.0"
    found = {finding.name: finding for finding in doctor.software()}
    assert found["torch"].problem is None


def test_anothers_opsd_is_named(monkeypatch, tmp_path):
    """PyPI's `opsd` is a client library: installed later, its `opsd/__init__.py` replaces ours."""
    information = tmp_path / "opsd-0.1.0.dist-info"
    information.mkdir()
    summary = "Python client library for the Opsd API"
    (information / "METADATA").write_text(f"Name: opsd\nVersion: 0.1.0\nSummary: {summary}\n")
    monkeypatch.syspath_prepend(tmp_path)
    # An editable install under our own old name holds no file of the package.
    (information / "RECORD").write_text("__editable__.opsd-0.1.0.pth,,\n")
    assert not [finding for finding in doctor.software() if finding.name == "opsd"]
    (information / "RECORD").write_text("opsd/__init__.py,,\nopsd/_client.py,,\n")
    (found,) = [finding for finding in doctor.software() if finding.name == "opsd"]
    assert found.fatal and summary in found.value and "another project's" in found.problem
    assert found.advice.startswith("pip uninstall opsd, then pip install")
    (ours,) = [finding for finding in doctor.software() if finding.name == "opsd-train"]
    assert ours.problem is None


def test_what_is_required_is_what_pyproject_says(monkeypatch):
    def none(_):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "requires", none)
    # In a checkout; an installed package has no pyproject.toml beside it.
    checkout = Path(__file__).parents[2]
    monkeypatch.setattr(doctor, "__file__", str(checkout / "opsd" / "cli" / "doctor.py"))
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    assert len(doctor.required()) == len(project["dependencies"])
    extra = "torch>=2.10", "numpy", "peft; extra == 'gpu'", "trl>=1.16; extra == 'test'"
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: list(extra))
    assert doctor.required() == {"torch": "2.10", "numpy": None}


@pytest.mark.parametrize(
    "cores, quota, threads, advice",
    [
        (8, None, None, None),
        (8, None, "8", None),
        (8, None, "1", "unset OMP_NUM_THREADS, or export OMP_NUM_THREADS=8"),
        (64, 4.0, None, "export OMP_NUM_THREADS=4"),
        (64, 4.0, "4", None),
        (2, 8.0, None, None),
        (4, 0.5, "1", None),
        (2, None, "16", "export OMP_NUM_THREADS=2"),
        (2, None, "2,1", None),
    ],
)
def test_threads_should_be_as_many_as_cores(cores, quota, threads, advice):
    assert doctor._cores(cores, quota, threads).advice == advice


@pytest.mark.parametrize(
    "total, available, problem",
    [
        (16 * GB, 8 * GB, None),
        (16 * GB, 3 * GB, "`opsd quickstart` wants"),
        (1 * GB, 1 * GB, "even `opsd quickstart --tiny`"),
    ],
)
def test_memory(total, available, problem):
    finding = doctor._memory(total, available)
    assert not finding.fatal
    assert (problem is None) == (finding.problem is None)
    assert problem is None or finding.problem.startswith(problem)


def test_this_machine_is_read_plausibly():
    total, available = memory()
    assert 0 < available <= total
    assert usable_cores() >= 1
    assert processor()[0]


def test_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=9 * GB))
    assert doctor._disk("disk", tmp_path / "not" / "yet").problem is None
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 * GB))
    assert "may need 4 GB" in doctor._disk("disk", tmp_path).problem
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "not writable" in doctor._disk("disk", tmp_path).problem


def modules(monkeypatch, **loaded):
    def import_module(name):
        if isinstance(loaded[name], Exception):
            raise loaded[name]
        return loaded[name]

    monkeypatch.setattr(importlib, "import_module", import_module)


def test_prefix_kernels(monkeypatch):
    reasons = {"tiles": None, "flash": "it needs a GPU"}
    stand_in = SimpleNamespace(KERNELS=reasons, missing=lambda name, device: reasons[name])
    torch = importlib.import_module("torch")
    modules(monkeypatch, **{"torch": torch, "opsd.prefix.attention": stand_in})
    tiles, flash = doctor.prefix_kernels()
    assert (tiles.value, tiles.absent) == ("usable", False)
    assert (flash.value, flash.absent) == ("unusable: it needs a GPU", True)
    missing = ImportError("no transformers")
    modules(monkeypatch, **{"torch": torch, "opsd.prefix.attention": missing})
    assert list(doctor.prefix_kernels()) == []


def test_kernels(monkeypatch):
    kernels = SimpleNamespace(backends=lambda: {"torch": None, "cpp": "not built", "cuda": "no"})
    modules(monkeypatch, opsd_kernels=kernels)
    torch, cpp, cuda = doctor.kernels()
    assert torch.problem is None and cuda.absent and cuda.problem is None
    assert "not built" in cpp.problem and "pip install" in cpp.advice and not cpp.fatal
    modules(monkeypatch, opsd_kernels=OSError("libgomp.so.1: cannot open"))
    (broken,) = doctor.kernels()
    assert broken.fatal and "libgomp" in broken.problem


def test_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("OPSD_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    disk, model, bases = doctor.caches()
    assert str(tmp_path) in disk.value and model.absent and bases.absent
    from opsd.quickstart import download

    monkeypatch.setattr(download, "GGUF_BYTES", 0)
    monkeypatch.setattr(download, "GGUF_SHA256", hashlib.sha256().hexdigest())
    download._cached().parent.mkdir()
    download._cached().touch()
    (tmp_path / "tiny-0-abc").mkdir()
    _, model, bases = doctor.caches()
    assert model.value == str(download._cached()) and not model.absent
    assert bases.value == "1 trained"
    modules(monkeypatch, **{"opsd.quickstart.download": ImportError("No module named 'rich'")})
    (unknown,) = doctor.caches()
    assert "rich" in unknown.value and unknown.problem is None


def test_accelerators(monkeypatch):
    card = SimpleNamespace(name="NVIDIA H100", total_memory=80 * GB, major=9, minor=0)
    cuda = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 1, get_device_properties=lambda _: card
    )
    modules(monkeypatch, torch=SimpleNamespace(cuda=cuda))
    (gpu,) = doctor.accelerators()
    assert gpu.value == "NVIDIA H100, 80 GB, compute capability 9.0"
    cuda.is_available = lambda: False
    modules(monkeypatch, torch=SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda=None)))
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidiactl")
    (unused,) = doctor.accelerators()
    assert "does not use it" in unused.problem and not unused.fatal
    modules(monkeypatch, torch=OSError("broken"))
    (broken,) = doctor.accelerators()
    assert broken.fatal


def test_the_module_imports_without_torch():
    code = "import sys, opsd.cli.doctor; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert run.stdout.strip() == "False", run.stderr
