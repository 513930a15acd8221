"""The cases to measure, with their candidates: a quick selection, an afternoon on a CPU, ten
minutes on a GPU.

The most important rows come first, since the time may not be enough for all.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .problem import TASKS, Case


@dataclass(frozen=True)
class Row:
    """A case and its candidates. Those that compile for every shape take part only if `compiled`;
    our backends and memory budgets only if asked for.
    """

    case: Case
    compiled: bool = False
    backends: bool = False
    budgets: tuple[int, ...] = ()  # MiB


def tasks(base: Case) -> Iterator[Case]:
    """Every task, with a trained and a frozen head."""
    for task in TASKS:
        for frozen in (False, True):
            yield replace(base, task=task, frozen=frozen)


def sweep(bases: tuple[Case, ...], field: str, values: tuple) -> Iterator[Row]:
    """The bases with one field changed, except for cases that are already among them."""
    for value in values:
        for base in bases:
            case = replace(base, **{field: value})
            if case != base:
                yield Row(case)


def quick() -> list[Row]:
    """Rows for under three minutes on two cores."""
    base = Case(256, 8192, 512)
    rows = [Row(case, compiled=case == base) for case in tasks(base)]
    jsd = replace(base, task="jsd", frozen=True)
    rows += [Row(replace(base, dtype="bfloat16"))]
    rows += sweep((base, jsd), "tokens", (64, 1024))
    rows += sweep((base, jsd), "vocabulary", (32768,))
    return rows


def cpu() -> list[Row]:
    """All rows: some 40 minutes on two cores."""
    base = Case(1024, 32768, 512)
    rows = [Row(case, compiled=True) for case in tasks(base)]
    rows[0] = replace(rows[0], backends=True, budgets=(16, 64, 256, 1024))
    jsd = replace(base, task="jsd", frozen=True)
    rows += [Row(replace(case, dtype="bfloat16"), compiled=True) for case in (base, jsd)]
    rows += sweep((base, jsd), "tokens", (64, 256, 4096))
    few = tuple(replace(case, tokens=256) for case in (base, jsd))
    rows += sweep(few, "vocabulary", (65536, 131072, 262144))
    rows += sweep(few, "width", (1024, 2048, 4096, 8192))
    return rows


def gpu() -> list[Row]:
    """The rows of the goals, then the sweeps: less than ten minutes on an H100 or H200."""
    base = Case(8192, 151936, 4096, "bfloat16")
    jsd = replace(base, task="jsd", frozen=True)
    rows = [Row(case) for case in tasks(base)]
    rows[0] = replace(rows[0], backends=True, budgets=(64, 256, 1024, 4096))
    rows += sweep((base, jsd), "tokens", (1024, 2048, 4096, 16384))
    few = tuple(replace(case, tokens=4096, vocabulary=131072) for case in (base, jsd))
    rows += [Row(case) for case in few]
    rows += sweep(few, "vocabulary", (32768, 65536, 262144))
    rows += sweep(few, "width", (512, 1024, 2048, 8192))
    rows += [Row(replace(few[0], dtype=dtype, width=2048)) for dtype in ("float32", "float16")]
    # Compilers come last, since they may need all remaining time.
    rows += [Row(replace(case, tokens=4096), compiled=True) for case in (base, jsd)]
    rows += [Row(replace(base, tokens=4096, task="log_prob"), compiled=True)]
    return rows


def one_shape(base: Case) -> list[Row]:
    """Every task at one shape, with all candidates."""
    return [Row(case, compiled=True, backends=True) for case in tasks(base)]
