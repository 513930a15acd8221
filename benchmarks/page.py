"""Makes one self-contained HTML page: `python -m benchmarks.page DIR` renders DIR/results.json
again.

Times are minima over rounds; x GEMM is a time divided by that of the bare products, for the same
case in the same run. Memory is the peak that a call adds, without the gradients that it returns. If
others used the machine, wall-clock times say little: then processor seconds are shown, and the page
says so.
"""

import io
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import matplotlib

from opsd.report.render import render

from .problem import Case

matplotlib.use("agg")
from matplotlib import pyplot

LETTERS = {"tokens": "N", "vocabulary": "V", "width": "D"}
AXES = {"tokens": "N, tokens", "vocabulary": "V, vocabulary", "width": "D, hidden width"}
COLOURS = {
    "ours": "#d62728",
    "ours, per token": "#ff9896",
    "gemms": "#555555",
    "dense": "#1f77b4",
    "compiled": "#17becf",
    "trl": "#2ca02c",
    "liger": "#9467bd",
    "liger cute": "#bcbd22",
    "liger chunked": "#c5b0d5",
    "cce": "#8c564b",
    "cce exact": "#e377c2",
    "quack": "#7f7f7f",
}


def seconds_of(row: dict, shared: bool) -> dict[str, dict]:
    """Name → {"min", "median", "all"}: wall-clock or processor seconds."""
    return row["cpu_seconds" if shared else "seconds"]


def extra_bytes(row: dict, name: str) -> int | None:
    """A candidate's peak memory without the gradients that it returns."""
    peak = row["peak_bytes"].get(name)
    return None if peak is None else max(0, peak - row["gradient_bytes"])


def case_of(row: dict) -> Case:
    return Case(**{name: row[name] for name in Case.__dataclass_fields__})


def page(report: dict) -> str:
    """Render the page of a report (see `__main__.py`)."""
    rows, shared = report["rows"], report["shared"]
    return render(
        "benchmark.html",
        report=report,
        figures=figures(rows, shared),
        cases=[(case_of(row).label, list(_lines(row, shared)), _untimed(row)) for row in rows],
    )


def _lines(row: dict, shared: bool) -> Iterator[tuple[str, list[str]]]:
    """Yield (candidate, cells of the table) for those that were timed."""
    times = seconds_of(row, shared)
    for name, time in times.items():
        extra, error = extra_bytes(row, name), row["errors"].get(name)
        yield (
            name,
            [
                f"{time['min'] * 1e3:.1f}",
                f"{time['median'] * 1e3:.1f}",
                f"{time['min'] / times['gemms']['min']:.2f}",
                f"{time['min'] / times['ours']['min']:.2f}",
                "" if extra is None else f"{extra / 2**20:.0f}",
                f"{max(error.values()):.0e}" if error else "",
            ],
        )


def _untimed(row: dict) -> list[tuple[str, str]]:
    """(candidate, the reason why it was not timed)."""
    reasons = [(what, *pair) for what in ("red", "failed") for pair in row[what].items()]
    return [(name, f"{what}, not timed: {reason}") for what, name, reason in reasons]


def figures(rows: list[dict], shared: bool) -> list[tuple[str, str]]:
    """(title, SVG) for each sweep: rows that differ only in one of N, V and D."""
    found = []
    for axis, label in AXES.items():
        groups = defaultdict(list)
        for row in rows:
            case = case_of(row).json()
            x = case.pop(axis)
            if row["seconds"]:
                groups[tuple(case.items())].append((x, row))
        for fixed, points in groups.items():
            if len({x for x, _ in points}) > 1:
                points = sorted(dict(points).items())
                found.append((_title(dict(fixed)), _figure(points, label, shared)))
    return found


def _title(fixed: dict) -> str:
    head = "frozen" if fixed["frozen"] else "trainable"
    shape = ", ".join(f"{LETTERS[k]} = {v}" for k, v in fixed.items() if k in LETTERS)
    return f"{fixed['task']}, {head} head, {fixed['dtype']}, {shape}"


def _figure(points: list[tuple[int, dict]], label: str, shared: bool) -> str:
    """Plot time, x GEMM and memory against the swept size."""
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    names = dict.fromkeys(n for _, row in points for n in row["seconds"])
    for name in names:
        if name not in COLOURS:  # backends and budgets are in the table
            continue
        line = {"color": COLOURS[name], "marker": "o", "markersize": 4}
        line |= {"label": name, "linewidth": 2.5 if name == "ours" else 1.2}
        times = [
            (x, seconds_of(row, shared)[name]["min"], seconds_of(row, shared)["gemms"]["min"])
            for x, row in points
            if name in row["seconds"]
        ]
        panels[0].plot([x for x, _, _ in times], [t * 1e3 for _, t, _ in times], **line)
        if name == "gemms":
            continue
        panels[1].plot([x for x, _, _ in times], [t / g for _, t, g in times], **line)
        extra = [(x, extra_bytes(row, name)) for x, row in points]
        memory = [(x, bytes_ / 2**20) for x, bytes_ in extra if bytes_]
        panels[2].plot([x for x, _ in memory], [m for _, m in memory], **line)
    for panel, title in zip(panels, ("milliseconds", "x GEMM", "MiB"), strict=True):
        panel.set(title=title, xlabel=label, xscale="log", yscale="log")
        panel.set_xticks([x for x, _ in points], [str(x) for x, _ in points])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[1].set(yscale="linear", ylim=(0, None))
    panels[0].legend(fontsize=8)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    pyplot.close(figure)
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]


def main() -> None:
    directory = Path(sys.argv[1])
    report = json.loads((directory / "results.json").read_text())
    (directory / "index.html").write_text(page(report))
    print(f"written: {directory / 'index.html'}")


if __name__ == "__main__":
    main()
