"""Describes what a figure depends on: machine, versions, commit."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from opsd_kernels import backends
from opsd_kernels.resolve import resolve

PACKAGES = (
    "torch",
    "triton",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "transformers",
    "opsd-train",
)


def describe() -> dict:
    """A description of the machine and software of a benchmark, JSON-ready."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "gpu": _gpu(),
        "backend": backend("cuda" if torch.cuda.is_available() else "cpu"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        **commit(),
    }


def commit() -> dict:
    """The checkout's commit; in a copy without history, the commit that was stored with it."""
    found, carried = _git("rev-parse", "HEAD"), os.environ.get("OPSD_CARRIED")
    if found is None and carried and (Path(carried) / "commit.json").exists():
        return json.loads((Path(carried) / "commit.json").read_text())
    changes = _git("status", "--porcelain", "opsd_kernels", "csrc")
    return {"commit": found, "uncommitted_changes": bool(changes)}


def backend(device: str) -> str:
    """The backend that computes our calls on the device. Exits rather than measure plain torch
    where a compiled backend is meant.
    """
    place = torch.device("cuda", 0) if device == "cuda" else torch.device(device)
    name = resolve("auto", place, torch.float32)
    if name == "torch":
        raise SystemExit(
            f"benchmarks: no compiled backend serves {device}, and nothing is measured with "
            f"another in its place: {backends()}"
        )
    return name


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict | None:
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str | None:
    """The driver's version, with clocks and temperature."""
    if shutil.which("nvidia-smi") is None:
        return None
    fields = "driver_version,clocks.sm,clocks.mem,temperature.gpu"
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parent.parent
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
