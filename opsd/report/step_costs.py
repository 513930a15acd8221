"""The costs of the phases of a run's steps, and the signs that it has collapsed."""

from collections.abc import Sequence
from statistics import median

from opsd.common.files import read_toml
from opsd.common.format import duration, percent, size
from opsd.runs.read import Run
from opsd.runs.records import Record

PARTS = ("rollout", "grading", "teacher", "student", "loss", "backward", "optimizer")

COLLAPSED: dict[str, str] = read_toml(__file__, "collapsed")
"""Measure of train.collapse → what the report says if it has collapsed."""


def cost_rows(run: Run) -> list[list[str]]:
    """[phase, median time, its share of the step, peak memory] of the phases that were measured."""
    found = {name: _known(run.metrics, f"{name}_seconds") for name in PARTS}
    seconds = {name: median(times) for name, times in found.items() if times}
    total = sum(seconds.values()) or 1.0
    rows = []
    for name, time in seconds.items():
        peaks = _known(run.metrics, f"{name}_peak_bytes")
        short = f"{time:.3g} s" if time >= 0.1 else f"{1000 * time:.2g} ms"
        shown = duration(time) if time >= 10 else short
        rows.append([name, shown, percent(time / total), size(max(peaks)) if peaks else ""])
    return rows


def collapses(runs: Sequence[Run]) -> list[str]:
    """A sentence on each collapse that a run recorded."""
    return [
        f"{run.name}, step {record['step']}: collapse? "
        f"{COLLAPSED.get(name, name).capitalize()} (train.collapse.{name})."
        for run in runs
        for record in run.metrics
        for name in record.get("collapse", [])
    ]


def _known(metrics: Sequence[Record], key: str) -> list[float]:
    return [y for record in metrics if (y := record.get(key)) is not None]
