"""Models the kernels' cost on a GPU by bytes, instructions, the products' shapes, and gaps.

    python -m benchmarks.gpu.model [check.json]     # the tables of docs/gpu-cost.md

All constants are assumed until `check` has run on a GPU; its JSON replaces the rates of copies, of
products and of launches by measured ones.
"""

import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from opsd_kernels.plan import Cost, Plan, plan
from opsd_kernels.sweep import FAST_ROWS, GPU_BUDGET
from opsd_kernels.tiles.state import ROWS as STATE

CODE = Path(__file__).parents[2] / "docs" / "kernels-gpu.json"
ITEMS, THREADS = 16, 256  # entries of a thread, threads of a block, csrc/cuda_chunk.h
STEP, ROW_BYTES, BOARD, MOST_BLOCKS = 4 * THREADS, 98 << 10, 512, 16  # csrc/cuda_rows.h
TILE = (128, 256)  # the part of a product's output that a thread block computes
# The kernels of csrc/cuda.cu that a call of each divergence runs, by their names in SASS.
NORMALISERS, SUMS = "normalisersILb0", "sumsILi{}ELb0ELb0"
GRADIENT = "gradientILi{}ELNS0_5KnownE0ELb0"
AT_ONCE = "gradientILi0ELNS0_5KnownE2ELb0"
ROWS = "rowsILi{}ELb0ELb0"
KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 3}  # jsd of beta 1/2


@dataclass(frozen=True)
class Gpu:
    """The nominal bytes and flops (2 for a multiply-add) a second, multiprocessors and clock; and
    the shares of them that a stream of loads, the lanes and a large bf16 product reach.
    """

    name: str
    bandwidth: float
    flops: float
    multiprocessors: int
    clock: float
    streamed: float = 0.9
    issued: float = 0.7
    multiplied: float = 0.72
    gap: float = 3e-6  # seconds between two kernels of a stream
    # Of the shorter of a row's two times, copying and computing. A multiprocessor has two blocks of
    # `rows`, of which one copies while the other computes.
    exposed: float = 0.25


GPUS = (
    Gpu("H100", 3.35e12, 989e12, 132, 1.755e9),
    Gpu("H200", 4.8e12, 989e12, 132, 1.755e9),
    Gpu("B200", 8.0e12, 2250e12, 148, 1.85e9),
)


@dataclass(frozen=True)
class Call:
    """N tokens, V entries, width D, bf16 operands, one head for both roles."""

    tokens: int = 8192
    vocabulary: int = 151936
    width: int = 4096
    kind: str = "forward_kl"
    frozen: bool = False


def instructions(vocabulary: int) -> dict[str, float]:
    """For each kernel the instructions an entry in the SASS for sm_90a, on the shortest path."""
    code = json.loads(CODE.read_text())["cuda_code"]
    kernels = {k["name"]: k for k in code if k["target"] == "sm_90a"}
    names = [NORMALISERS, AT_ONCE]
    names += [n.format(kind) for n in (SUMS, GRADIENT, ROWS) for kind in KINDS.values()]
    found = {n: next(v for k, v in kernels.items() if k.startswith(n)) for n in names}
    own = vocabulary / blocks_of(vocabulary) / THREADS  # entries of a thread of `rows`
    return {
        name: k["looped"] / 4 + (k["shortest_way"] - k["looped"]) / own
        if name.startswith("rows")
        else k["shortest_way"] / ITEMS
        for name, k in found.items()
    }


def triton_instructions() -> dict[str, float]:
    """The same of Triton's kernels, under the names of CUDA's that do the same."""
    found = {}
    for kernel in json.loads(CODE.read_text())["triton"]:
        if kernel["target"] != "sm_90" or kernel.get("SOFTCAP") or kernel.get("CLIP"):
            continue
        cost, kind = kernel["shortest_way"] / ITEMS, kernel.get("KIND")
        if kernel["name"] == "normalisers":
            found[NORMALISERS] = cost / 2  # a role's
        elif kernel["name"] == "sums":
            found[SUMS.format(kind)] = cost
        elif kernel["name"] == "gradient" and kernel["SUMS_KNOWN"]:
            found[GRADIENT.format(kind)] = cost
        elif kernel["name"] == "gradient" and kind == 0:
            found[AT_ONCE] = cost
    return found


def blocks_of(vocabulary: int) -> int:
    """The blocks of a row's cluster."""
    blocks = 1
    while 8 * max(vocabulary / blocks, STEP) + BOARD > ROW_BYTES and blocks < MOST_BLOCKS:
        blocks *= 2
    return blocks


# What is done with a block's logits: everything in one visit; a kernel for each of normalisers,
# sums and gradient, CUDA's or Triton's; or CUDA's with gradients in fp32 over the logits, rounded
# by another pass.
ONE_VISIT, PASSES, TRITON, EARLIER = "one visit", "passes", "triton", "earlier"

# --- Times, in seconds ---


def product(gpu: Gpu, m: int, n: int, k: int, out: int, added: bool = False) -> float:
    """[m, k] [k, n] of 2-byte operands into `out` bytes an entry, which are read first if `added`.
    Output tiles fill the multiprocessors in waves; if there is one wave, k is split to fill it.
    """
    tiles = math.ceil(m / TILE[0]) * math.ceil(n / TILE[1])
    waves = math.ceil(tiles / gpu.multiprocessors)
    full = tiles / (waves * gpu.multiprocessors) if waves > 1 else 0.9
    busy = 2 * m * n * k / (gpu.flops * gpu.multiplied * full)
    traffic = (2 * (m * k + n * k) + out * m * n * (2 if added else 1)) / gpu.bandwidth
    # Adding waits for its reads, partly during the next tile's products.
    waits = 0.5 * min(busy, 2 * out * m * n / gpu.bandwidth) if added else 0.0
    return max(busy, traffic) + waits


def stream(gpu: Gpu, entries: float, moved: float, issued: float) -> float:
    """A pass that moves so many bytes and issues so many instructions for each entry."""
    lanes = gpu.multiprocessors * 128 * gpu.clock * gpu.issued
    return max(entries * moved / (gpu.bandwidth * gpu.streamed), entries * issued / lanes)


def passes(gpu: Gpu, entries: float, kind: str, written: int, cost: dict[str, float]) -> float:
    """The normalisers of both roles, the sums if the gradient needs them first, and the gradient, a
    kernel each.
    """
    time = stream(gpu, entries, 8, 2 * cost[NORMALISERS])
    if kind == "forward_kl":
        return time + stream(gpu, entries, 8 + written, cost[AT_ONCE])
    time += stream(gpu, entries, 8, cost[SUMS.format(KINDS[kind])])
    return time + stream(gpu, entries, 8 + written, cost[GRADIENT.format(KINDS[kind])])


def one_visit(gpu: Gpu, entries: float, kind: str, cost: dict[str, float]) -> float:
    """The same in one kernel, which reads the logits once."""
    times = stream(gpu, entries, 10, 0), stream(gpu, entries, 0, cost[ROWS.format(KINDS[kind])])
    return max(times) + gpu.exposed * min(times)


def planned(call: Call, budget: int | None, grouped: bool = True) -> Plan:
    """The plan that `sweep.plan_call` makes for such a call."""
    v, d = call.vocabulary, call.width
    cost = Cost(8, token=4 * STATE, one_pass_token=4 * d, gradient=2, group_token=4 * d)
    grouped = grouped and not call.frozen
    if budget is None:
        budget = GPU_BUDGET
        if grouped:
            budget = max(budget, 4 * v * d)
            whole = cost.bytes(min(FAST_ROWS, call.tokens), v, True, call.tokens)
            budget = whole if budget < whole <= budget + 4 * v * d else budget
    fast = {"fast_rows": FAST_ROWS, "fast_columns": 4096}
    return plan(call.tokens, v, cost, budget=budget, grouped=grouped, **fast)


def fused(gpu: Gpu, call: Call, how: Plan, cost: dict[str, float], way: str = ONE_VISIT) -> float:
    """One call, forward and backward. `way`: see ONE_VISIT."""
    if not how.one_pass:
        return tiled(gpu, call, how, cost)
    v, d, time = call.vocabulary, call.width, 0.0
    for start in range(0, call.tokens, how.group):
        m = min(how.group, call.tokens - start)
        for first in range(0, m, how.rows):
            n = min(how.rows, m - first)
            time += product(gpu, 2 * n, v, d, 4)
            if way == ONE_VISIT:
                time += one_visit(gpu, n * v, call.kind, cost) + 3 * gpu.gap
                continue
            time += passes(gpu, n * v, call.kind, 4 if way == EARLIER else 2, cost) + 8 * gpu.gap
            if way == EARLIER:
                time += stream(gpu, n * v, 6, 4)
        time += product(gpu, m, d, v, 4, added=True) + gpu.gap
        if not call.frozen:
            once = how.groups == 1
            time += product(gpu, v, d, m, 2 if once else 4, added=not once) + gpu.gap
    if not call.frozen and how.groups > 1:
        time += 10 * v * d / gpu.bandwidth  # zeroing the sum, and rounding it at the end
    return time


def tiled(gpu: Gpu, call: Call, how: Plan, cost: dict[str, float]) -> float:
    """The same with a budget of fewer than FAST_ROWS rows: on tiles of the vocabulary, whose logits
    are computed for the normalisers, for sums that the gradient needs first, and for the gradient.
    """
    v, d, time = call.vocabulary, call.width, 0.0
    sweeps = 2 if call.kind == "forward_kl" else 3
    for start in range(0, call.tokens, how.rows):
        n = min(how.rows, call.tokens - start)
        for first in range(0, v, how.columns):
            columns = min(how.columns, v - first)
            time += sweeps * (2 * product(gpu, n, columns, d, 4) + 4 * gpu.gap)
            time += passes(gpu, n * columns, call.kind, 2, cost)
            time += product(gpu, n, d, columns, 4, added=True) + gpu.gap
            if not call.frozen:
                once = how.blocks == 1
                time += product(gpu, columns, d, n, 2 if once else 4, added=not once) + gpu.gap
    if not call.frozen and how.blocks > 1:
        time += 10 * v * d / gpu.bandwidth
    return time


def bare(gpu: Gpu, call: Call, blocks: int = 1) -> float:
    """Only the products, in so many blocks of tokens: benchmarks/candidates.py has 2 GiB each."""
    n, v, d = math.ceil(call.tokens / blocks), call.vocabulary, call.width
    time = 2 * product(gpu, n, v, d, 4) + product(gpu, n, d, v, 4)
    if not call.frozen:
        time += product(gpu, v, d, n, 2)
    return blocks * time


def measured(gpu: Gpu, rows: dict[str, dict]) -> Gpu:
    """The GPU with the shares that `terms` measured."""
    return replace(
        gpu,
        streamed=rows["copy"]["GB_s"] * 1e9 / gpu.bandwidth,
        multiplied=rows["dW in 16 bits, 8192 rows"]["TF_s"] * 1e12 / gpu.flops,
        gap=rows["200 launches"]["ms"] / 200e3,
    )


# --- Tables ---

Planned = tuple[str, Call, int | None, str]  # name, call, budget, way


def ratios(gpus: tuple[Gpu, ...], calls: list[Planned]) -> list[str]:
    """Lines of a table: each call's time as a multiple of the bare products in one block."""
    lines = []
    for name, call, budget, way in calls:
        how = planned(call, budget, way != EARLIER)
        cost = triton_instructions() if way == TRITON else instructions(call.vocabulary)
        cells = [f"{fused(g, call, how, cost, way) / bare(g, call):.2f}" for g in gpus]
        lines.append(f"| {name} | {how.rows} | {how.group} | {' | '.join(cells)} |")
    return lines


def tables(gpus: tuple[Gpu, ...] = GPUS) -> str:
    one = Call()
    names, cost = " | ".join(g.name for g in gpus), instructions(one.vocabulary)
    triton = triton_instructions()
    head = f"| | n | m | {names} |\n| --- | --- | --- |{' --- |' * len(gpus)}"
    calls: list[Planned] = []
    for kind in KINDS:
        for frozen in (False, True):
            call = Call(kind=kind, frozen=frozen)
            title = f"{kind}, {'frozen' if frozen else 'trained'}"
            calls.append((title, call, None, ONE_VISIT))
    few: list[Planned] = [(f"{k}, N = 1024", Call(1024, kind=k), None, ONE_VISIT) for k in KINDS]
    few += [(f"{k}, trained, by passes", Call(kind=k), None, PASSES) for k in KINDS]
    few += [(f"{k}, trained, by Triton", Call(kind=k), None, TRITON) for k in KINDS]
    many: list[Planned] = [("earlier: fp32 gradients, a level", one, GPU_BUDGET, EARLIER)]
    many += [(f"{b} MiB", one, b * 2**20, ONE_VISIT) for b in (64, 256, 512, 1024, 2048, 4096)]
    many += [("default", one, None, ONE_VISIT)]
    many += [(f"64 MiB, {k}", Call(kind=k), 2**26, ONE_VISIT) for k in KINDS if k != one.kind]
    entries = [
        ("normalisers, both roles", 8, 2 * cost[NORMALISERS]),
        *((f"sums, {k}", 8, cost[SUMS.format(i)]) for k, i in KINDS.items()),
        *((f"gradient, {k}", 10, cost[GRADIENT.format(i)]) for k, i in KINDS.items()),
        ("gradient and sums at once, forward_kl", 10, cost[AT_ONCE]),
        *((f"all in one visit, {k}", 10, cost[ROWS.format(i)]) for k, i in KINDS.items()),
        ("Triton: normalisers, both roles", 8, 2 * triton[NORMALISERS]),
        *((f"Triton: sums, {k}", 8, triton[SUMS.format(i)]) for k, i in KINDS.items()),
        *((f"Triton: gradient, {k}", 10, triton[GRADIENT.format(i)]) for k, i in KINDS.items()),
        ("Triton: gradient and sums at once, forward_kl", 10, triton[AT_ONCE]),
    ]
    e = one.tokens * one.vocabulary
    each = [
        f"| {name} | {moved} | {issued:.1f} | "
        + " | ".join(f"{1e3 * stream(g, e, moved, issued):.1f}" for g in gpus)
        + " |"
        for name, moved, issued in entries
    ]

    def dw(g: Gpu, rows: int, out: int, added: bool) -> float:
        return product(g, one.vocabulary, one.width, rows, out, added)

    products = [
        ("bare, one block, trained", lambda g: bare(g, one)),
        ("bare, three blocks, as the benchmark has them", lambda g: bare(g, one, 3)),
        ("dW of 683 rows, twelve times, added to fp32", lambda g: 12 * dw(g, 683, 4, True)),
        ("dW of 8192 rows, once, in 16 bits", lambda g: dw(g, 8192, 2, False)),
    ]
    made = [f"| {n} | " + " | ".join(f"{1e3 * f(g):.1f}" for g in gpus) + " |" for n, f in products]
    shares = [
        f"| {g.name} | {g.bandwidth / 1e12:.2f}, {g.streamed:.2f} "
        f"| {g.flops / 1e12:.0f}, {g.multiplied:.2f} "
        f"| {g.multiprocessors}, {g.clock / 1e9:.2f}, {g.issued:.2f} | {1e6 * g.gap:.0f} |"
        for g in gpus
    ]
    return "\n".join(
        [
            "Time ÷ bare products in one block: N = 8192, V = 151 936, D = 4096, bf16, the default",
            "budget; n tokens of fp32 logits at a time, m tokens a product of gradients.\n",
            head,
            *ratios(gpus, calls + few),
            "\nForward KL, trained head, by budget:\n",
            head,
            *ratios(gpus, many),
            "\nMilliseconds of each pass over all N·V entries, the longer of its bytes' time and",
            "its instructions' (SASS for sm_90a, shortest way; jsd of beta 1/2):\n",
            f"| | bytes an entry | instructions | {names} |",
            f"| --- | --- | --- |{' --- |' * len(gpus)}",
            *each,
            "\nMilliseconds of products:\n",
            f"| | {names} |\n| --- |{' --- |' * len(gpus)}",
            *made,
            "\nAssumed, each with the share of it that is reached:\n",
            "| | memory, TB/s | products, TF/s | multiprocessors of 128 lanes, GHz | gap, µs |",
            "| --- | --- | --- | --- | --- |",
            *shares,
            "",
        ]
    )


if __name__ == "__main__":
    chosen: tuple[Gpu, ...] = GPUS
    if len(sys.argv) > 1:
        parts = json.loads(Path(sys.argv[1]).read_text())["parts"]
        found = next(part["results"] for part in parts if part["name"] == "terms")
        rows = {row["what"]: row for row in found["rows"]}
        chosen = tuple(measured(g, rows) for g in GPUS if g.name in found["gpu"])
    print(tables(chosen))
