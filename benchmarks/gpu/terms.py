"""Measures each term of a call's cost separately: tile functions in GB/s, and products in TF/s.

    python -m benchmarks.gpu.terms [--cpu] [--json FILE] [--once]

Every rate is shown with the model's (`model.py`), and `rules.py` says what follows from it. --once:
call each tile function once, for a profiler. --cpu: tiny sizes, to see that it runs.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from opsd_kernels import LogitTransform, backends, gemm
from opsd_kernels.divergence import Divergence, Rule
from opsd_kernels.resolve import load
from opsd_kernels.tiles import state as states
from opsd_kernels.tiles.logits import Logits

from .rules import verdicts


class Clock:
    """Measures medians of repeated calls with the device's clock; collects the rates by name."""

    def __init__(self, cpu: bool, once: bool) -> None:
        self.cpu, self.once = cpu, once
        self.rows: list[dict] = []

    def __call__(
        self, what: str, call: Callable[[], object], *, read: float = 0, flops: float = 0
    ) -> None:
        """Measure `call`. read: the bytes that it reads and writes."""
        seconds = self._seconds(call)
        row = {"what": what, "ms": seconds * 1e3}
        if read:
            row["GB_s"] = read / seconds / 1e9
        if flops:
            row["TF_s"] = flops / seconds / 1e12
        self.rows.append(row)
        numbers = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "what")
        print(f"{what:44}{numbers}", flush=True)

    def _seconds(self, call: Callable[[], object]) -> float:
        if self.once or self.cpu:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        for _ in range(3):
            call()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(13)]
        torch.cuda.synchronize()
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
        return statistics.median(times) / 1e3


def memory(clock: Clock, device: str) -> None:
    x = torch.empty(2**30 if device == "cuda" else 2**20, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    clock("copy", lambda: y.copy_(x), read=2 * x.numel())
    one = torch.zeros(1, device=device)
    # Enough small kernels to keep the queue full, to measure the gap between two.
    clock("200 launches", lambda: [one.add_(1.0) for _ in range(200)])


def tile_functions(clock: Clock, name: str, rows: int, vocabulary: int, device: str) -> None:
    """Measure a backend's functions on one tile of both roles, as a step calls them."""
    functions = load(name)
    base = [3 * torch.randn(rows, vocabulary, device=device) for _ in range(2)]
    student, teacher = (x.clone() for x in base)
    low = torch.empty(rows, vocabulary, dtype=torch.bfloat16, device=device)
    weight = torch.full((rows,), 1e-4, device=device)
    targets = torch.randint(vocabulary, (rows,), device=device)
    entries, roles = rows * vocabulary, (Logits(student), Logits(teacher))

    def gradient(rule: Rule, state, out, known: bool) -> None:
        functions.gradient_(*roles, rule, state, weight, known, out)

    for kind in ("forward_kl", "reverse_kl", "jsd"):
        rule, state = Rule(Divergence(kind)), states.new(rows, student, torch.float32)
        call = lambda: functions.normalisers(*roles, rule, state)  # noqa: B023, E731
        if kind == "forward_kl":
            clock(f"{name} normalisers", call, read=8 * entries)
        else:
            call()
        sums = lambda: functions.sums(*roles, rule, state)  # noqa: B023, E731
        clock(f"{name} sums {kind}", sums, read=8 * entries)
        # Repeated in place: the values change, the amount of work does not.
        for out, written, ending in ((None, 4, ""), (low, 2, ", in 16 bits")):
            known = lambda: gradient(rule, state, out, True)  # noqa: B023, E731
            clock(f"{name} gradient {kind}{ending}", known, read=(8 + written) * entries)
            student.copy_(base[0])
            if kind == "forward_kl":
                at_once = lambda: gradient(rule, state, out, False)  # noqa: B023, E731
                clock(f"{name} gradient at once{ending}", at_once, read=(8 + written) * entries)
                student.copy_(base[0])
        if hasattr(functions, "rows") and functions.row_fits(student.device, vocabulary):
            visit = lambda: functions.rows(*roles, rule, state, weight, low)  # noqa: B023, E731
            clock(f"{name} one visit {kind}", visit, read=10 * entries)
    state, plain = states.new_log_prob(rows, student, torch.float32), LogitTransform()
    one = roles[0]
    clock(
        f"{name} log_prob normalisers",
        lambda: functions.log_prob_normalisers(one, targets, plain, state),
        read=4 * entries,
    )
    clock(
        f"{name} log_prob gradient, in 16 bits",
        lambda: functions.log_prob_gradient_(one, targets, plain, state, weight, low),
        read=6 * entries,
    )


def products(clock: Clock, vocabulary: int, width: int, device: str, many: int) -> None:
    """Measure the three products for several numbers of tokens."""
    gpu, low = device == "cuda", torch.bfloat16
    head = (0.03 * torch.randn(vocabulary, width, device=device)).to(low)
    for n in (256, 512, 1024) if gpu else (8,):
        logits(clock, head, n, gpu)
    for n in (683, 2048, many) if gpu else (8,):
        gradients(clock, head, n, gpu)


def logits(clock: Clock, head: Tensor, n: int, gpu: bool) -> None:
    """Measure the logits of both roles."""
    wide = {"out_dtype": torch.float32} if gpu else {}
    hidden = torch.randn(2 * n, head.shape[1], device=head.device).to(head.dtype)
    dtype = torch.float32 if gpu else head.dtype
    out = torch.empty(2 * n, head.shape[0], device=head.device, dtype=dtype)
    flops = 4 * n * head.numel()
    clock(f"logits, {n} rows", lambda: torch.mm(hidden, head.t(), out=out, **wide), flops=flops)


def gradients(clock: Clock, head: Tensor, n: int, gpu: bool) -> None:
    """Measure dh and dW: added to sums in fp32 (only on a GPU), and dW written directly."""
    vocabulary, width = head.shape
    hidden = torch.randn(n, width, device=head.device).to(head.dtype)
    gradient = (1e-4 * torch.randn(n, vocabulary, device=head.device)).to(head.dtype)
    flops = 2 * n * head.numel()
    if gpu:
        dh, dw = (torch.zeros(rows, width, device=head.device) for rows in (n, vocabulary))
        add = gemm._add_product_
        clock(f"dh added to fp32, {n} rows", lambda: add(dh, gradient, head), flops=flops)
        clock(f"dW added to fp32, {n} rows", lambda: add(dw, gradient.t(), hidden), flops=flops)
    out = torch.empty_like(head)
    once = lambda: torch.mm(gradient.t(), hidden, out=out)  # noqa: E731
    clock(f"dW in 16 bits, {n} rows", once, flops=flops)


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.terms", description=__doc__)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = "cpu" if options.cpu else "cuda"
    rows, vocabulary, width = (8, 4096, 64) if options.cpu else (256, 151936, 4096)
    clock = Clock(options.cpu, options.once)
    memory(clock, device)
    for name, reason in backends().items():
        if reason is None and name != ("torch" if options.cpu else "cpp"):
            tile_functions(clock, name, rows, vocabulary, device)
    if not options.once:
        products(clock, vocabulary, width, device, 8 if options.cpu else 8192)
    gpu = None if options.cpu else torch.cuda.get_device_name()
    said = [] if options.cpu else verdicts({row["what"]: row for row in clock.rows})
    print("\n".join(said))
    if options.json:
        found = {"gpu": gpu, "rows": clock.rows, "verdicts": said}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
