"""Checks before anything is measured: prints a line for each, PASS or FAIL with the reason.

    python -m benchmarks.gpu.smoke [--cpu] [--json FILE]

It does not stop at a failure; the exit status is then 1. --cpu: only what a CPU can do.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from opsd_kernels import backends, gemm, linear_divergence

from .. import machine

Check = Callable[[str], str | None]
CHECKS: dict[str, Check] = {}


def check(name: str) -> Callable[[Check], Check]:
    """Register a function of the device that asserts; its result is shown."""

    def add(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return add


def gpu_backends(device: str) -> tuple[str, ...]:
    return ("triton", "cuda") if device == "cuda" else ("torch", "cpp")


def error(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-30))


def gradients(device: str, backend: str, dtype: torch.dtype, **options) -> list[Tensor]:
    """Loss, dh and dW of the same random problem, whose numbers are exact in bf16."""
    torch.manual_seed(0)
    n, v, d = (300, 20011, 128) if device == "cuda" else (60, 2011, 32)
    student = torch.randn(n, d)
    teacher = student + 0.5 * torch.randn(n, d)
    weight = torch.randn(v, d) * 2 / d**0.5
    student, teacher, weight = (x.bfloat16().to(device, dtype) for x in (student, teacher, weight))
    student.requires_grad_(), weight.requires_grad_()
    loss = linear_divergence(student, teacher, weight, backend=backend, **options).loss
    loss.backward()
    assert student.grad is not None and weight.grad is not None
    return [loss.detach(), student.grad, weight.grad]


@check("both GPU backends are usable")
def _(device: str) -> str:
    found = backends()
    assert device == "cpu" or (found["cuda"] is None and found["triton"] is None), found
    return str(found)


@check("products of 16-bit operands leave in fp32")
def _(device: str) -> str | None:
    if device == "cpu":
        return "skipped: a CPU's library has no such product"
    a, b = (torch.randn(n, 512, device=device).bfloat16() for n in (256, 384))
    out = torch.empty(256, 384, device=device)
    torch.mm(a, b.t(), out_dtype=torch.float32, out=out)
    assert error(out, a.double() @ b.double().T) < 1e-5
    before, exact = out.clone(), a.double() @ b.double().T
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    gemm._add_product_(out, a, b.t())
    assert error(out, before.double() + exact) < 1e-5
    adds = gemm._adds_to_fp32(out.device, torch.bfloat16)
    extra = torch.cuda.max_memory_allocated() - base
    return (
        f"they add to fp32 in place: {adds} (if not, {extra} bytes more for a sum of {out.nbytes})"
    )


@check("products in fp32 are not TF32")
def _(device: str) -> str:
    a, b = torch.randn(2, 512, 512, device=device)
    off = error(a @ b, a.double() @ b.double())
    assert off < 1e-5, off
    return f"off by {off:.0e}"


@check("gradients, against torch in fp64")
def _(device: str) -> str:
    said = []
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        for budget in (None, 2**19):
            options = {"divergence": divergence, "memory_budget": budget}
            truth = gradients(device, "torch", torch.float64, **options)
            for backend in gpu_backends(device):
                for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
                    got = gradients(device, backend, dtype, **options)
                    off = max(error(x, y) for x, y in zip(got, truth, strict=True))
                    assert off < limit, (backend, divergence, budget, dtype, off)
                    said.append(off)
    return f"{len(said)} cases, off by at most {max(said):.0e}"


@check("fp16 gradients of 4096 tokens do not vanish")
def _(device: str) -> str:
    torch.manual_seed(0)
    n, v, d = (4096, 16384, 128) if device == "cuda" else (512, 2048, 16)
    student, noise = torch.randn(2, n, d, device=device)
    weight = torch.randn(v, d, device=device) * 2 / d**0.5
    found = []
    for dtype in (torch.float16, torch.float32):
        made = (x.half().to(dtype) for x in (student, student + 0.5 * noise, weight))
        hidden, teacher, head = made
        # Use a loss scale, as in fp16 training: without one, 1/N is too small for the result's
        # dtype.
        hidden.requires_grad_(), head.requires_grad_()
        (1024 * linear_divergence(hidden, teacher, head, divergence="jsd").loss).backward()
        found.append((hidden.grad, head.grad))
    off = [error(x, y) for x, y in zip(*found, strict=True)]
    assert max(off) < 3e-2, off
    return f"dh off by {off[0]:.0e}, dW by {off[1]:.0e}"


@check("another stream, capture in a graph, replay")
def _(device: str) -> str | None:
    if device == "cpu":
        return "skipped: a CPU has no streams"
    side = torch.cuda.Stream()
    for backend in gpu_backends(device):
        with torch.cuda.stream(side):
            gradients(device, backend, torch.float32)
        torch.cuda.synchronize()
        want = gradients(device, backend, torch.float32)
        with torch.cuda.stream(side):
            got = gradients(device, backend, torch.float32)
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(want, got, strict=True)), backend
        _replay(backend, side)
    return None


def _replay(backend: str, side: torch.cuda.Stream) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(64, 64, device="cuda", requires_grad=True)
    teacher = torch.randn(64, 64, device="cuda")
    weight = torch.randn(5003, 64, device="cuda", requires_grad=True)

    def call() -> tuple[Tensor, ...]:
        loss = linear_divergence(hidden, teacher, weight, divergence="jsd", backend=backend).loss
        return torch.autograd.grad(loss, (hidden, weight))

    with torch.cuda.stream(side):
        call(), call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    with torch.no_grad():
        hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(kept, call(), strict=True)), backend


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.smoke", description=__doc__)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for name, function in CHECKS.items():
        began, row = time.perf_counter(), {"check": name, "passed": True}
        try:
            row["said"] = function("cpu" if options.cpu else "cuda")
        except Exception as failure:
            row |= {"passed": False, "said": f"{type(failure).__name__}: {failure}"[:500]}
            traceback.print_exc(limit=-2)
        row["seconds"] = round(time.perf_counter() - began, 2)
        found.append(row)
        print("PASS" if row["passed"] else "FAIL", name, row["said"] or "", flush=True)
    versions = {name: machine.version(name) for name in machine.PACKAGES}
    if options.json:
        options.json.write_text(json.dumps({"checks": found, "versions": versions}, indent=1))
    return int(not all(row["passed"] for row in found))


if __name__ == "__main__":
    sys.exit(main())
