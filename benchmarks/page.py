"""One HTML page, with nothing outside it: `python -m benchmarks.page DIR` draws DIR/results.json
again.

Times are the minimum over rounds; x GEMM is that over the bare products' of the same case in the
same run. Memory is the peak that a call adds, less the gradients that it returns. On a machine that
others used meanwhile the clock says little: then processor seconds are shown, and the page says so.
"""

import io
import json
import sys
from collections import defaultdict
from html import escape
from pathlib import Path

import matplotlib

from benchmarks.problem import Case

matplotlib.use("agg")
from matplotlib import pyplot

AXES = {"tokens": "N, tokens", "vocabulary": "V, vocabulary", "width": "D, hidden width"}
COLOURS = {
    "ours": "#d62728",
    "ours, per token": "#ff9896",
    "gemms": "#555555",
    "dense": "#1f77b4",
    "compiled": "#17becf",
    "trl": "#2ca02c",
    "liger": "#9467bd",
    "liger chunked": "#c5b0d5",
    "cce": "#8c564b",
    "cce exact": "#e377c2",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em;
  color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .15em .8em; text-align: right }
th { border-bottom: 1px solid #999; font-weight: 600 } td.name { text-align: left }
tr.first td { border-top: 1px solid #ccc } tr.ours td { font-weight: 600 }
.red { color: #b00020; font-weight: 600 } svg { max-width: 100%; height: auto }
.note { color: #555 }
"""


def seconds_of(row: dict, shared: bool) -> dict[str, dict]:
    """Name → {"min", "median", "all"}: by the clock, or of the processor."""
    return row["cpu_seconds" if shared else "seconds"]


def extra_bytes(row: dict, name: str) -> int | None:
    """A candidate's peak memory beside the gradients that it returns."""
    peak = row["peak_bytes"].get(name)
    return None if peak is None else max(0, peak - row["gradient_bytes"])


def case_of(row: dict) -> Case:
    return Case(**{name: row[name] for name in Case.__dataclass_fields__})


def page(report: dict) -> str:
    """The page of a report (see `__main__.py`)."""
    shared = report["shared"]
    parts = [
        "<!doctype html><meta charset=utf-8><title>opsd_kernels: benchmarks</title>",
        f"<style>{STYLE}</style><h1>opsd_kernels beside its peers</h1>",
        f"<p>{escape(_machine(report))}</p>",
        "<p>Forward and backward, minimum and median over interleaved rounds; every candidate's "
        "result was compared before it was timed. Memory: peak beside the gradients returned.</p>",
    ]
    if shared:
        parts.append(
            "<p class=red>A shared machine: times are processor seconds of all cores, not those "
            "of the clock.</p>"
        )
    parts += ["<p class=red>Uncommitted changes.</p>"] * report["machine"]["uncommitted_changes"]
    parts += _list("Not here", report["missing"])
    parts += _list("Not run: the time was over", dict.fromkeys(report["left_out"], ""))
    parts += [f"<h2>{title}</h2>{figure}" for title, figure in figures(report["rows"], shared)]
    parts.append(f"<h2>All cases</h2>{_table(report['rows'], shared)}")
    return "\n".join(parts)


def _machine(report: dict) -> str:
    machine = report["machine"]
    where = f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores"
    if machine["gpu"]:
        where = f"{machine['gpu']['name']}, CUDA {machine['gpu']['cuda']}; {where}"
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    return f"{where}. {versions}. Commit {machine['commit']}, {report['started']} UTC."


def _list(title: str, items: dict[str, str]) -> list[str]:
    if not items:
        return []
    lines = "".join(
        f"<li>{escape(name)}{': ' * bool(reason)}{escape(reason)}</li>"
        for name, reason in items.items()
    )
    return [f"<h2>{title}</h2><ul>{lines}</ul>"]


def _table(rows: list[dict], shared: bool) -> str:
    lines = [
        "<table><tr><th>case<th>who<th>min, ms<th>median, ms<th>&times; GEMM<th>&times; ours"
        "<th>memory, MiB<th>error</tr>"
    ]
    for row in rows:
        times = seconds_of(row, shared)
        label = escape(case_of(row).label)
        first = True
        for name, t in times.items():
            extra, error = extra_bytes(row, name), row["errors"].get(name)
            cells = [
                f"{t['min'] * 1e3:.1f}",
                f"{t['median'] * 1e3:.1f}",
                f"{t['min'] / times['gemms']['min']:.2f}",
                f"{t['min'] / times['ours']['min']:.2f}",
                "" if extra is None else f"{extra / 2**20:.0f}",
                f"{max(error.values()):.0e}" if error else "",
            ]
            kind = " ".join(["first"] * first + ["ours"] * (name == "ours"))
            lines.append(
                f"<tr class='{kind}'><td class=name>{label if first else ''}<td class=name>"
                f"{escape(name)}<td>{'<td>'.join(cells)}</tr>"
            )
            first = False
        for what in ("red", "failed"):
            for name, reason in row[what].items():
                lines.append(
                    f"<tr><td class=name>{label if first else ''}<td class='name red'>"
                    f"{escape(name)}<td colspan=6 class='name red'>{what}, not timed: "
                    f"{escape(reason)}</tr>"
                )
                first = False
    return "\n".join([*lines, "</table>"])


def figures(rows: list[dict], shared: bool) -> list[tuple[str, str]]:
    """(title, SVG) for each sweep: rows that differ in one of N, V and D only."""
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
    letters = {"tokens": "N", "vocabulary": "V", "width": "D"}
    shape = ", ".join(f"{letters[k]} = {v}" for k, v in fixed.items() if k in letters)
    return f"{fixed['task']}, {head} head, {fixed['dtype']}, {shape}"


def _figure(points: list[tuple[int, dict]], label: str, shared: bool) -> str:
    """Time, x GEMM and memory against what is swept."""
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
        memory = [(x, extra_bytes(row, name)) for x, row in points]
        memory = [(x, bytes_ / 2**20) for x, bytes_ in memory if bytes_]
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
