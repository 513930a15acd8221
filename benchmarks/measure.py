"""The protocol: agree, warm up, then interleave the candidates; minimum and median; peak memory."""

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.candidates import Problem, Result


class Disagreement(Exception):
    """A candidate's result is not ours: its time would mean nothing."""


def check_agreement(problem: Problem, candidates: dict[str, Callable[[Problem], Result]]) -> None:
    """Loss and gradients of each candidate against the first's, to 1e-3 relative."""
    (first, reference), *others = [(name, run(problem)) for name, run in candidates.items()]
    for name, result in others:
        for what, x, y in zip(("loss", "dh", "dW"), result, reference, strict=True):
            if y is None:
                continue
            error = float((x - y).norm() / y.norm())
            if not error < 1e-3:
                raise Disagreement(f"{name} and {first} differ by {error:.1e} in {what}")


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict]:
    """Seconds of each call: {"min", "median", "all"}. One warm-up each, then round robin."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {
        name: {"min": min(t), "median": statistics.median(t), "all": t} for name, t in times.items()
    }


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Resident memory a call adds at its peak, beside what it returns. None where /proc has no
    such.
    """
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    call()
    # What the allocator keeps of freed memory would hide as much of the next call's.
    ctypes.CDLL(None).malloc_trim(0)
    try:
        clear.write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def measure(
    n: int, v: int, d: int, divergence: str, trainable: bool, rounds: int, run: dict, gemms
):
    """One row of the report. Raises Disagreement before anything is timed."""
    check_agreement(Problem.make(min(n, 64), v, d, divergence, trainable), run)
    problem = Problem.make(n, v, d, divergence, trainable)
    calls = {name: (lambda f=f: f(problem)) for name, f in run.items()}
    calls["gemms"] = lambda: gemms(problem)
    times = interleaved(calls, rounds)
    memory = {name: peak_bytes(call) for name, call in calls.items() if name != "gemms"}
    return {
        "N": n,
        "V": v,
        "D": d,
        "dtype": str(torch.float32).removeprefix("torch."),
        "divergence": divergence,
        "head": "trainable" if trainable else "frozen",
        "seconds": times,
        "peak_bytes": memory,
    }
