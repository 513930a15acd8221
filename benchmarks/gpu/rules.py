"""Compares measurements with the design: for each term the least value that the design assumes, and
what to do next if it is not reached.
"""

from collections.abc import Callable
from dataclasses import dataclass

Rows = dict[str, dict]  # the rows of `terms`, by name


@dataclass(frozen=True)
class Rule:
    """`value` of the rows must be at least `least`; a KeyError means that it was not measured."""

    what: str
    value: Callable[[Rows], float]
    least: float
    otherwise: str

    def verdict(self, rows: Rows) -> str:
        try:
            value = self.value(rows)
        except KeyError as missing:
            return f"not measured: {self.what} ({missing})"
        if value >= self.least:
            return f"as counted on: {self.what} {value:.2f} (at least {self.least})"
        return f"NEXT: {self.what} {value:.2f}, below {self.least}: {self.otherwise}"


def _of_copy(name: str) -> Callable[[Rows], float]:
    return lambda rows: rows[name]["GB_s"] / rows["copy"]["GB_s"]


def _ratio(above: str, below: str, unit: str = "TF_s") -> Callable[[Rows], float]:
    return lambda rows: rows[above][unit] / rows[below][unit]


def _passes(backend: str) -> Callable[[Rows], float]:
    """The time of forward KL's passes with Triton, as a multiple of this backend's."""
    names = ("normalisers", "gradient at once, in 16 bits")
    return lambda rows: (
        sum(rows[f"triton {n}"]["ms"] for n in names)
        / sum(rows[f"{backend} {n}"]["ms"] for n in names)
    )


RULES = (
    Rule(
        "cuda's normalisers, of a copy's bandwidth",
        _of_copy("cuda normalisers"),
        0.6,
        "loads are waited for one by one: see ncu's long scoreboard, then cp.async into shared "
        "memory in csrc/cuda_chunk.h (load)",
    ),
    Rule(
        "triton's normalisers, of a copy's bandwidth",
        _of_copy("triton normalisers"),
        0.6,
        "CHUNK and WARPS in opsd_kernels/tiles/triton.py: try 4096 and 8",
    ),
    Rule(
        "forward KL's gradient in 16 bits, of a copy's bandwidth",
        _of_copy("cuda gradient at once, in 16 bits"),
        0.55,
        "it is bound by instructions: take its sums online (one visit), or fewer per entry",
    ),
    Rule(
        "jsd's sums, of a copy's bandwidth",
        _of_copy("cuda sums jsd"),
        0.4,
        "bound by instructions: log cosh for beta 1/2 in csrc/divergence.h",
    ),
    Rule(
        "cuda's passes: triton's time ÷ cuda's",
        _passes("cuda"),
        1.0,
        "triton stays first in opsd_kernels/resolve.py; where it is 1.05 or more, cuda goes first",
    ),
    Rule(
        "logits of 256 rows, of the rate of 1024",
        _ratio("logits, 256 rows", "logits, 1024 rows"),
        0.92,
        "raise FAST_ROWS in opsd_kernels/sweep.py to 512",
    ),
    Rule(
        "dW of 8192 rows at once ÷ dW of 683 added to fp32",
        _ratio("dW in 16 bits, 8192 rows", "dW added to fp32, 683 rows"),
        1.1,
        "two levels gain nothing: GPU_BUDGET alone in opsd_kernels/sweep.py, no 4·V·D",
    ),
    Rule(
        "dW of 2048 rows added to fp32, of 8192 rows at once",
        _ratio("dW added to fp32, 2048 rows", "dW in 16 bits, 8192 rows"),
        0.85,
        "groups of 2048 are too few: ask for a budget that holds all rows, docs/gpu.md",
    ),
    Rule(
        "launches in a millisecond",
        lambda rows: 200 / rows["200 launches"]["ms"],
        200.0,
        "gaps of more than 5 µs: capture the call in a graph, or raise FAST_ROWS in "
        "opsd_kernels/sweep.py",
    ),
)


def verdicts(rows: Rows) -> list[str]:
    return [rule.verdict(rows) for rule in RULES]
