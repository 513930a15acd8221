"""Facts about the system: versions, processor, memory and its peak; and freeing memory."""

import ctypes
import gc
import os
import platform
import resource
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = "opsd-train torch transformers accelerate datasets tokenizers numpy vllm".split()


def versions() -> dict[str, str]:
    """The versions of Python and of those PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def may_have_gpu() -> bool:
    """Whether a GPU's driver is here, which is known without torch."""
    with suppress(OSError):
        return bool(ctypes.CDLL("libcuda.so.1"))
    return sys.platform != "linux" or Path("/dev/kfd").exists()  # AMD's


def vllm_is_for_cpus() -> bool:
    """Whether the installed vLLM is a build for CPUs, by its version."""
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
    """The most memory that this process has used, in bytes; on a GPU machine, of GPU memory."""
    import torch

    if torch.cuda.is_available():
        return max(_earlier_peak, torch.cuda.max_memory_allocated())
    if sys.platform == "linux":  # here ru_maxrss would include the parent's memory at the fork
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


_earlier_peak = 0  # bytes: the GPU's peak before the last `restart_peak`


def restart_peak() -> None:
    """Restart torch's count of the GPU's peak; `peak_memory` remembers the earlier one."""
    import torch

    global _earlier_peak
    _earlier_peak = max(_earlier_peak, torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()


def release_memory() -> None:
    """Free unreachable objects and give their pages back to the system."""
    gc.collect()  # the Trainer and its callbacks refer to each other
    trim_heap()


def trim_heap() -> None:
    """Return the heap's free pages to the system. glibc keeps them: gigabytes after training, 50 MB
    more with each step.
    """
    if trim := _glibc("malloc_trim"):
        trim(0)


def share_one_heap() -> None:
    """Make all threads use one heap, which keeps its free pages until `trim_heap`; call it before
    there are any. Otherwise glibc gives autograd's thread its own heap, and maps each large tensor
    anew: a page fault for each 4 kB."""
    if mallopt := _glibc("mallopt"):  # M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        for option, value in ((-8, 1), (-3, 1 << 30), (-1, 1 << 30)):
            mallopt(option, value)


def _glibc(name: str):
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), name, None)  # musl lacks these functions


def processor() -> tuple[str, frozenset[str]]:
    """(model name, instruction set flags) of the CPU; without /proc/cpuinfo there are no flags."""
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
    """The number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota() -> float | None:
    """The CPU time that the container grants, in cores; None if there is no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def memory() -> tuple[int, int]:
    """(total, available) bytes of memory for this process, at most the container's limit."""
    import psutil  # here, so that `opsd doctor` can run without it and report that it is missing

    total, available = psutil.virtual_memory()[:2]
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no container, no limit ("max")
        return total, available
    return min(total, limit), min(available, max(0, limit - used))
