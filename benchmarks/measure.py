"""The protocol: check, warm up, measure in turn, then measure memory.

1. Our result must agree with the fp64 truth on a few tokens; otherwise nothing is timed.
2. Each candidate's warm-up, at full size, must agree with ours. One that does not is red, and one
   that raises has failed: neither is timed, and both are in the report with the reason.
3. The candidates run in turn, so that a slow minute of the machine affects all; minimum and
   median. The first round comes after the warm-up, in which compilers work.
4. Peak memory is measured in separate calls.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from .candidates import COMPILES, Run, gemms, rows_of_a_part
from .problem import Case, Problem, Result

# The largest relative error of an equal result. Rounding logits to bf16 causes 1e-2.
LIMITS = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 3e-2}
CHECKED_TOKENS = 32
LEAST_ROUNDS = 2


class Disagreement(Exception):
    """A candidate's result is wrong, so its time would mean nothing."""


def check(result: Result, truth: Result, limit: float) -> dict[str, float]:
    """The relative errors of loss, dh and dW. Raises Disagreement if one is above `limit`."""
    errors = {}
    for name, x, y in zip(("loss", "dh", "dW"), result, truth, strict=True):
        if y is None:
            continue
        if x is None:
            raise Disagreement(f"gives no {name}")
        errors[name] = float((x.double() - y.double()).norm() / y.double().norm())
        if not errors[name] <= limit:
            raise Disagreement(f"differs by {errors[name]:.1e} in {name}")
    return errors


def interleaved(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    synchronize: Callable[[], None] = lambda: None,
    limit_seconds: float = float("inf"),
) -> dict[str, dict[str, dict]]:
    """{"seconds", "cpu_seconds"} → name → {"min", "median", "all"}. CPU seconds are this process's
    on all cores, without those of other processes.

    After `limit_seconds` no new round begins, unless there were fewer than two.
    """
    wall: dict[str, list[float]] = {name: [] for name in calls}
    busy: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for k in range(rounds):
        if k >= LEAST_ROUNDS and time.perf_counter() - began > limit_seconds:
            break
        for name, call in calls.items():
            synchronize()
            start, used = time.perf_counter(), time.process_time()
            call()
            synchronize()
            wall[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - used)
    return {
        kind: {
            name: {"min": min(t), "median": statistics.median(t), "all": t}
            for name, t in times.items()
        }
        for kind, times in (("seconds", wall), ("cpu_seconds", busy))
    }


def measure(
    case: Case,
    device: str,
    run: dict[str, Run],
    rounds: int,
    limit_seconds: float = float("inf"),
) -> dict:
    """Measure one row of the report, JSON-ready. `run`: the candidates, ours first."""
    problem, limit = Problem.make(case, device), LIMITS[case.dtype]
    row = {**case.json(), "errors": {}, "warm_up": {}, "red": {}, "failed": {}}
    row |= {"seconds": {}, "cpu_seconds": {}, "peak_bytes": {}}
    ours, *others = run
    few = problem.first(CHECKED_TOKENS)
    if COMPILES[device] & set(run):
        torch.compiler.reset()  # each case is compiled for its own shape
    kept: dict[str, Callable[[], object]] = {}
    reference: Result | None = None
    result: Result | None = None
    for name in (ours, *others):
        start = time.perf_counter()
        try:
            if name == ours:
                row["errors"][name] = check(run[name](few), few.truth(), limit)
            result = run[name](problem)
            if reference is None:
                reference = result
            else:
                row["errors"][name] = check(result, reference, limit)
        except Disagreement as error:
            row["red"][name] = f"{error} from {'fp64' if name == ours else 'ours'}"
        except Exception as error:  # a peer may raise anything
            row["failed"][name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            kept[name] = partial(run[name], problem)
            row["warm_up"][name] = time.perf_counter() - start
        result = None
        _empty_cache(device)
        if name == ours and name not in kept:
            return row
    reference = None
    gradients = problem.student.nbytes + (0 if case.frozen else problem.weight.nbytes)
    bare: dict[str, Callable[[], object]] = {"gemms": partial(gemms, problem)}
    if rows_of_a_part(case) < case.tokens:
        bare["gemms, one block"] = partial(gemms, problem, parts=False)
    for call in bare.values():
        call()
    kept |= bare
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    row |= interleaved(kept, rounds, synchronize, limit_seconds)
    for name, call in kept.items():
        if name not in bare:
            row["peak_bytes"][name] = peak_bytes(call, device)
    return row | {"gradient_bytes": gradients}


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int | None:
    """The memory that a call adds at its peak, with its results. None if /proc does not tell."""
    if device == "cuda":
        _empty_cache(device)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    call()
    # Freed memory that the allocator keeps would hide as much of the next call's.
    ctypes.CDLL(None).malloc_trim(0)
    try:
        clear.write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _empty_cache(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
