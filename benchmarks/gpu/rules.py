"""Compares measurements with the design: for each term the least value that the design assumes, and
what to do next if it is not reached.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from benchmarks.problem import Case

Rows = dict[str, dict]  # the rows of `terms`, by name; seconds of other parts, by case and name


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


PASSES = {
    "forward_kl": ("normalisers", "gradient at once, in 16 bits"),
    "jsd": ("normalisers", "sums jsd", "gradient jsd, in 16 bits"),
}


def _passes_to_visit(backend: str, kind: str) -> Callable[[Rows], float]:
    """The time of a backend's passes, as a multiple of that of cuda's one visit."""
    visit = f"cuda one visit {kind}"
    return lambda rows: sum(rows[f"{backend} {n}"]["ms"] for n in PASSES[kind]) / rows[visit]["ms"]


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
        "it is bound by instructions: fewer per entry",
    ),
    Rule(
        "jsd's sums, of a copy's bandwidth",
        _of_copy("cuda sums jsd"),
        0.4,
        "bound by instructions: see the loop's in docs/kernels-gpu.json",
    ),
    *(
        Rule(
            f"one visit for {kind}: the time of cuda's passes ÷ its",
            _passes_to_visit("cuda", kind),
            1.1,
            "ncu: copies (cp.async.bulk) or barriers (fewer sums) in csrc/cuda_rows.h; below 1, "
            "row_fits in opsd_kernels/tiles/cuda.py says no",
        )
        for kind in PASSES
    ),
    Rule(
        "forward KL: triton's time ÷ that of cuda's one visit",
        _passes_to_visit("triton", "forward_kl"),
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


# --- The goals, by whole calls and steps ---

KL = Case(8192, 151936, 4096, "bfloat16")
JSD = replace(KL, task="jsd")
LOG_PROB = replace(KL, task="log_prob")
ONE_BLOCK = "gemms, one block"
PROFILE = "profile both (rest, counters): it reads or multiplies less than ours"


def _times(case: str, above: str, below: str = "ours") -> Callable[[Rows], float]:
    return lambda rows: rows[case][above] / rows[case][below]


BENCH_RULES = (
    Rule(
        "bare products in one block ÷ forward KL",
        _times(KL.label, ONE_BLOCK),
        0.83,
        "docs/gpu-cost.md has 1.10 for its inverse: the first NEXT of check has the cause",
    ),
    Rule(
        "bare products in one block ÷ JSD",
        _times(JSD.label, ONE_BLOCK),
        0.78,
        "docs/gpu-cost.md has 1.11 for its inverse: see the rules of one visit in check",
    ),
    Rule(
        "bare products in one block ÷ JSD, frozen head",
        _times(replace(JSD, frozen=True).label, ONE_BLOCK),
        0.72,
        "group the gradients for dh alone too: `grouped` in opsd_kernels/sweep.py",
    ),
    Rule(
        "bare products ÷ forward KL, N = 1024",
        _times(replace(KL, tokens=1024).label, "gemms"),
        0.8,
        "see the launches in check: capture the call in a graph",
    ),
    Rule(
        "forward KL by triton ÷ by cuda",
        _times(KL.label, "ours, triton", "ours, cuda"),
        1.0,
        "triton stays first in opsd_kernels/resolve.py; where it is 1.05 or more, cuda goes first",
    ),
    Rule(
        "forward KL in 1 GiB ÷ in 4 GiB",
        _times(KL.label, "ours, 1024 MiB", "ours, 4096 MiB"),
        1.03,
        "two levels gain nothing: GPU_BUDGET alone in opsd_kernels/sweep.py, no 4·V·D",
    ),
    Rule("TRL's forward KL ÷ ours", _times(KL.label, "trl"), 1.0, PROFILE),
    Rule("Liger's JSD ÷ ours", _times(JSD.label, "liger"), 1.0, PROFILE),
    Rule("Liger's JSD by CuTe ÷ ours", _times(JSD.label, "liger cute"), 1.0, PROFILE),
    Rule("exact cut-cross-entropy ÷ ours", _times(LOG_PROB.label, "cce exact"), 1.0, PROFILE),
    Rule("QuACK's cross-entropy ÷ ours", _times(LOG_PROB.label, "quack"), 1.0, PROFILE),
    Rule("torch's cross-entropy ÷ ours", _times(LOG_PROB.label, "torch chunked"), 1.0, PROFILE),
)
STEP, FLASH = "4,8,200,1000,1024", "shared, flash"  # one of benchmarks/step.py's GPU_CASES
STEP_RULES = (
    Rule(
        "a step by flex ÷ by flash",
        _times(STEP, "shared, flex", FLASH),
        1.0,
        "flex goes before flash: PREFERENCE in opsd/prefix/attention.py",
    ),
    Rule(
        "a step by flash_attn ÷ by flash",
        _times(STEP, "shared, flash_attn", FLASH),
        1.0,
        "flash_attn goes first: PREFERENCE in opsd/prefix/attention.py",
    ),
    Rule(
        "a compiled step ÷ by flash",
        _times(STEP, "compiled", FLASH),
        0.95,
        "offer it: torch.compile for feed-forward and norms, as in benchmarks/step_ways.py",
    ),
    Rule(
        "each rollout alone ÷ contexts once",
        _times(STEP, "naive", FLASH),
        1.15,
        "the operators in step.json say what takes the time that products save",
    ),
    Rule("TRL's forward ÷ a step by flash", _times(STEP, "trl", FLASH), 1.0, PROFILE),
)
TRL_RULES = (
    Rule("times faster than TRL", lambda rows: rows["all"]["times_faster"], 1.0, PROFILE),
    Rule(
        "times less memory than TRL",
        lambda rows: rows["all"]["times_less_memory"],
        1.0,
        "the parts of step.json have each part's memory; train.micro_batch_tokens bounds it",
    ),
)


def of_bench(report: dict) -> list[str]:
    rows: Rows = {}
    for row in report["rows"]:
        case = Case(**{name: row[name] for name in Case.__dataclass_fields__}).label
        rows.setdefault(case, {}).update({n: t["min"] for n, t in row["seconds"].items()})
    return verdicts(rows, BENCH_RULES)


def of_step(report: dict) -> list[str]:
    rows: Rows = {
        ",".join(map(str, row["case"].values())): {n: t["min"] for n, t in row["seconds"].items()}
        for row in report["rows"]
    }
    return verdicts(rows, STEP_RULES)


def of_trl_step(report: dict) -> list[str]:
    return verdicts({"all": report}, TRL_RULES)


OF_PARTS = {"bench": of_bench, "step": of_step, "trl_step": of_trl_step}


def verdicts(rows: Rows, rules: Iterable[Rule] = RULES) -> list[str]:
    return [rule.verdict(rows) for rule in rules]
