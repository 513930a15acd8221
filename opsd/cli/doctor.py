"""`opsd doctor`: reports what this machine has, what is missing, and how to fix it.

Nothing here imports torch at the top: a torch that cannot be imported is one of the findings.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from opsd.common.display import Display
from opsd.common.format import size
from opsd.common.system import cpu_quota, memory, processor, usable_cores
from opsd.quickstart import DISK, MEMORY, TINY_MEMORY
from opsd.quickstart.cache import cache_directory, tiny_bases

DISTRIBUTION = "opsd-train"  # `opsd` on PyPI is another project's
OPTIONAL = {"peft": "LoRA", "reasoning-gym": "problems without end", "triton": "GPU kernels"}
OPTIONAL |= {"flash-attn": "attention on GPUs", "vllm": "fast rollouts on GPUs"}
# Instruction sets that the compiled kernels use, or that make matrix products fast.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


@dataclass(frozen=True)
class Finding:
    """One line of the report. fatal: the problem makes training impossible here. absent: something
    optional is missing.
    """

    name: str
    value: str
    problem: str | None = None
    advice: str | None = None
    fatal: bool = False
    absent: bool = False


def run(parsed: argparse.Namespace | None, write: Callable[[str], None] | None = None) -> int:
    """Writes a line for each finding on this machine; returns 0 if training is possible, else 1."""
    write, findings = write or Display().note, []
    for title, examine in SECTIONS:
        write(title)
        for finding in examine():
            write(_line(finding))
            findings.append(finding)
        write("")
    problems = [finding for finding in findings if finding.problem]
    fatal = [finding for finding in problems if finding.fatal]
    for finding in problems:
        kind = "problem" if finding.fatal else "note"
        write(f"{kind}: {finding.name}: {finding.problem}")
        if finding.advice:
            write(f"  → {finding.advice}")
    if problems:
        write("")
    well = "Training is possible here. Try: opsd quickstart --tiny"
    write(f"Training is not possible here yet: {len(fatal)} to mend." if fatal else well)
    return 1 if fatal else 0


def _line(finding: Finding) -> str:
    problem, well = "NO" if finding.fatal else "!", "-" if finding.absent else "ok"
    mark = problem if finding.problem else well
    return f"  {mark:<2}  {finding.name:<18}  {finding.value}".rstrip()


def software() -> Iterator[Finding]:
    """Python, this package, its dependencies and the optional packages."""
    python = f"{platform.python_version()} ({sys.executable})"
    problem = "3.11 or later is needed" if sys.version_info < (3, 11) else None
    advice = "make the virtual environment with a newer Python"
    yield Finding("Python", python, problem, advice, fatal=True)
    ours = _version(DISTRIBUTION)
    yield Finding(DISTRIBUTION, ours or f"not installed, used from {Path(__file__).parent.parent}")
    yield from _foreign()
    for name, oldest in required().items():
        yield _requirement(name, oldest, _version(name))
    for name, purpose in OPTIONAL.items():
        version = _version(name)
        missing = f"not installed (optional: {purpose})"
        yield Finding(name, version or missing, absent=version is None)


def _foreign() -> Iterator[Finding]:
    """Another project's PyPI package named `opsd`, if its files have overwritten ours."""
    for other in importlib.metadata.distributions(name="opsd"):
        if any(str(file) == "opsd/__init__.py" for file in other.files or ()):
            yield Finding(
                "opsd",
                f"{other.version}: {other.metadata['Summary']}",
                f"another project's package takes the place of {DISTRIBUTION} in `import opsd`",
                f"pip uninstall opsd, then pip install --force-reinstall --no-deps {DISTRIBUTION}",
                fatal=True,
            )


def required() -> dict[str, str | None]:
    """Maps each required package to the oldest version that works, None if any does."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        project = Path(__file__).parents[2] / "pyproject.toml"
        lines = tomllib.loads(project.read_text())["project"]["dependencies"]
    found = (re.fullmatch(r"([\w.-]+)(?:>=([\d.]+))?", line) for line in lines)  # skips the extras
    return {match[1]: match[2] for match in found if match}


def _requirement(name: str, oldest: str | None, version: str | None) -> Finding:
    if version is None:
        advice = "pip install -c constraints-cpu.txt ."
        return Finding(name, "not installed", "needed", advice, fatal=True)
    old = f"{oldest} or later is needed" if oldest and Version(version) < Version(oldest) else None
    return Finding(name, version, old, old and f"pip install '{name}>={oldest}'", bool(old))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> Iterator[Finding]:
    """System, processor, cores, memory, disk."""
    yield Finding("system", f"{platform.platform()}")
    name, flags = processor()
    shown = ", ".join(flag for flag in CPU_FLAGS if flag in flags)
    yield Finding("processor", f"{name} ({shown})" if shown else name)
    yield _cores(usable_cores(), cpu_quota(), os.environ.get("OMP_NUM_THREADS"))
    try:
        yield _memory(*memory())
    except ImportError:  # psutil is missing: `software` reports that
        yield Finding("memory", "unknown")
    yield _disk("disk", Path.cwd())


def _cores(cores: int, quota: float | None, threads: str | None) -> Finding:
    value = f"{cores} usable" + (f", OMP_NUM_THREADS={threads}" if threads else "")
    limit = cores if quota is None else min(cores, quota)
    if quota is not None and quota < cores:
        value += f", the container grants {quota:g}"
    best = max(1, int(limit))
    used = int(threads) if threads and threads.isdigit() else cores
    problem, advice = None, f"export OMP_NUM_THREADS={best}"
    if used > limit and used > best:
        problem = f"{used} threads for {limit:g} cores wait for each other"
    elif used < best:
        problem = f"only {used} of {best} cores will be used"
        advice = f"unset OMP_NUM_THREADS, or {advice}"
    return Finding("cores", value, problem, problem and advice)


def _memory(total: int, available: int) -> Finding:
    value = f"{size(total)}, {size(available)} available"
    problem = None
    if available < TINY_MEMORY:
        problem = f"even `opsd quickstart --tiny` wants {size(TINY_MEMORY)}"
    elif available < MEMORY:
        problem = f"`opsd quickstart` wants {size(MEMORY)}, --tiny {size(TINY_MEMORY)}"
    return Finding("memory", value, problem, "end other programs, or use a larger machine")


def _disk(label: str, path: Path) -> Finding:
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free, problem = shutil.disk_usage(existing).free, None
    if not os.access(existing, os.W_OK):
        problem, advice = f"{existing} is not writable", "choose another directory"
    elif free < DISK:
        problem = f"models and checkpoints of a quickstart may need {size(DISK)}"
        advice = "make room, or choose another disk"
    value = f"{size(free)} free at {path}"
    if problem:
        advice += ": --output DIR for runs, OPSD_CACHE for the cache"
    return Finding(label, value, problem, problem and advice)


def accelerators() -> Iterator[Finding]:
    """GPUs: those that torch sees, or an NVIDIA driver that torch cannot use."""
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken installation raises OSError, ImportError, RuntimeError …
        yield _does_not_import("torch", error, "pip install --force-reinstall torch")
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        yield Finding(f"GPU {index}", f"{gpu.name}, {size(gpu.total_memory)}, {capability}")
    if count == 0:
        problem = advice = None
        if Path("/dev/nvidiactl").exists():
            problem = "there is an NVIDIA driver, but torch does not use it"
            advice = f"torch is built for CUDA {torch.version.cuda}: does the driver support that?"
            if torch.version.cuda is None:
                advice = "install a torch built for CUDA: pip install --force-reinstall torch"
        where = "none in use: training runs on the CPU"
        yield Finding("GPU", where, problem, advice, absent=True)


def _does_not_import(name: str, error: Exception, advice: str) -> Finding:
    said = f"{type(error).__name__}: {error}"
    return Finding(name, "does not import", said, advice, fatal=True)


def kernels() -> Iterator[Finding]:
    """The backends of opsd_kernels, each usable or with the reason why not."""
    try:
        backends = importlib.import_module("opsd_kernels").backends()
    except Exception as error:
        yield _does_not_import("opsd_kernels", error, "pip install -c constraints-cpu.txt .")
        return
    for name, reason in backends.items():
        if reason is None:
            yield Finding(name, "usable")
        elif name == "cpp":  # is built with the package, so something went wrong
            problem = f"{reason} (until then the slower torch backend serves)"
            advice = "pip install -c constraints-cpu.txt . (needs a C++ compiler)"
            yield Finding(name, "unusable", problem, advice)
        else:
            yield Finding(name, f"unusable: {reason}", absent=True)


def prefix_kernels() -> Iterator[Finding]:
    """The values of train.prefix_kernel, each usable here or with the reason why not."""
    try:
        torch = importlib.import_module("torch")
        known = importlib.import_module("opsd.prefix.attention")
    except Exception:  # `software` and `accelerators` report what is missing
        return
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    for name in known.KERNELS:
        reason = known.missing(name, device)
        yield Finding(name, f"unusable: {reason}" if reason else "usable", absent=bool(reason))


def caches() -> Iterator[Finding]:
    """The models that quickstart has already downloaded or trained."""
    try:
        download = importlib.import_module("opsd.quickstart.download")
        place = cache_directory()
    except Exception as error:  # `software` and `accelerators` report what is missing
        yield Finding("quickstart", f"cannot be examined ({error})", absent=True)
        return
    yield _disk("disk", place)
    model = download.present()
    missing = f"not here yet: quickstart downloads it once ({size(download.GGUF_BYTES)})"
    yield Finding("SmolLM2-135M", str(model or missing), absent=model is None)
    bases = len(tiny_bases())
    value = f"{bases} trained" if bases else "none yet: quickstart --tiny trains one"
    yield Finding("tiny bases", value, absent=bases == 0)


SECTIONS: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
    ("Software", software),
    ("Machine", machine),
    ("Accelerators", accelerators),
    ("Kernels", kernels),
    ("Attention over shared prefixes", prefix_kernels),
    ("Cache", caches),
)
