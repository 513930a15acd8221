"""Facts that belong to a result: versions, machine, peak memory."""

import ctypes
import gc
import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "opsd-train",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "numpy",
    "vllm",
)


def versions() -> dict[str, str]:
    """The versions of Python and of the main packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def vllm_is_for_cpus() -> bool:
    """Whether the vLLM that is installed is a build for CPUs: its version says so."""
    return "cpu" in versions().get("vllm", "")


def machine() -> dict[str, str | int]:
    """The processor, its cores and memory, the system, and the GPU if there is one."""
    import psutil
    import torch

    found: dict[str, str | int] = {
        "system": f"{platform.system()} {platform.release()}",
        "processor": processor()[0],
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def peak_memory() -> int:
    """The most memory this process has held, in bytes (on a GPU: the device's)."""
    import torch

    if torch.cuda.is_available():
        return max(_earlier_peak, torch.cuda.max_memory_allocated())
    if sys.platform == "linux":  # ru_maxrss begins with the parent's memory at the fork
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


_earlier_peak = 0  # of the GPU's memory, before `restart_peak`


def restart_peak() -> None:
    """Count the GPU's peak from now on; `peak_memory` remembers the earlier one."""
    import torch

    global _earlier_peak
    _earlier_peak = max(_earlier_peak, torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()


def release_memory() -> None:
    """Free unreachable objects and give their pages back to the system."""
    gc.collect()  # Trainer and its callbacks are a cycle
    trim_heap()


def trim_heap() -> None:
    """Give free pages inside the heap back to the system. glibc keeps them: gigabytes after
    training, 50 MB more with each step.
    """
    trim = _glibc("malloc_trim")
    if trim:
        trim(0)


def share_one_heap() -> None:
    """One heap for all threads; to be called before there are any. In glibc autograd's backward
    thread would have its own, with its own free pages.
    """
    mallopt = _glibc("mallopt")
    if mallopt:
        mallopt(-8, 1)  # M_ARENA_MAX


def _glibc(name: str):
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), name, None)  # musl has no such function


def processor() -> tuple[str, frozenset[str]]:
    """(model name, flags) of the CPU, as far as the system tells."""
    name = platform.processor() or platform.machine()
    flags: frozenset[str] = frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return name, flags
    for line in lines:
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            name = value
        elif key in ("flags", "Features"):
            flags = frozenset(value.split())
    return name, flags


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota() -> float | None:
    """How many cores' worth of time the container grants; None if there is no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def memory() -> tuple[int, int]:
    """(all, available) bytes of memory for this process, a container's limit included."""
    import psutil  # here, since `opsd doctor` says which packages are missing

    total, available = psutil.virtual_memory()[:2]
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no container, no limit ("max")
        return total, available
    return min(total, limit), min(available, max(0, limit - used))
