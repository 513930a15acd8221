"""What the parts of a run's steps cost, and which measures say that it has collapsed."""

from collections.abc import Sequence
from statistics import median

from opsd.common.format import duration, percent, size
from opsd.report.markup import Html, tag
from opsd.runs.read import Record, Run, value

PARTS = ("rollout", "grading", "teacher", "student", "loss", "backward", "optimizer")

COLLAPSED = {
    "entropy": "the student's entropy has fallen away",
    "length": "rollouts have become short",
    "pass_at_k": "pass@k of the rollouts has fallen",
    "inverted_gradient": "the clip inverts the gradient of too many tokens",
}
"""Of train.collapse's measures."""


def cost_section(runs: Sequence[Run]) -> Html | None:
    """A table of each run's parts; None where none measured any."""
    tables = [(run, _table(run.metrics)) for run in runs]
    tables = [(run, table) for run, table in tables if table]
    if not tables:
        return None
    several = len(tables) > 1
    boxes = [
        tag("div", tag("h3", run.name) if several else None, table, class_="scroll")
        for run, table in tables
    ]
    note = (
        "The median over steps; memory is the most that was held while a part ran. The loss has "
        "the gradient of its inputs in it."
    )
    return tag(
        "section",
        tag("h2", "What a step costs"),
        tag("div", boxes, class_="facts"),
        tag("p", note, class_="note"),
        id="costs",
    )


def collapses(runs: Sequence[Run]) -> list[str]:
    """A sentence on each measure that a run flagged."""
    return [
        f"{run.name}, step {value(record, 'step') or 0:g}: collapse? "
        f"{COLLAPSED.get(name, name).capitalize()} (train.collapse.{name})."
        for run in runs
        for record in run.metrics
        for name in _names(record.get("collapse"))
    ]


def _names(found: object) -> list[str]:
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _table(metrics: Sequence[Record]) -> Html | None:
    seconds = {name: _median(metrics, f"{name}_seconds") for name in PARTS}
    known = {name: found for name, found in seconds.items() if found is not None}
    if not known:
        return None
    total = sum(known.values()) or 1.0
    rows = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            tag("td", duration(found) if found >= 10 else f"{found:.3g} s"),
            tag("td", percent(found / total)),
            tag("td", _peak(metrics, name)),
        )
        for name, found in known.items()
    ]
    columns = ("", "Time", "Share", "Memory")
    head = tag("tr", [tag("th", column, scope="col") for column in columns])
    return tag("table", tag("thead", head), tag("tbody", rows), class_="results")


def _peak(metrics: Sequence[Record], name: str) -> str:
    peaks = [p for r in metrics if (p := value(r, f"{name}_peak_bytes")) is not None]
    return size(max(peaks)) if peaks else ""


def _median(metrics: Sequence[Record], key: str) -> float | None:
    found = [y for record in metrics if (y := value(record, key)) is not None]
    return median(found) if found else None
