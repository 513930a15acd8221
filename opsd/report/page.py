"""Render the report of a run: compute the values that templates/report.html shows."""

import json
from collections.abc import Sequence

from opsd.common.files import read_toml
from opsd.common.format import duration, size
from opsd.report.charts import NOISY, Chart, Series, accuracy_chart
from opsd.report.render import render
from opsd.report.rollouts import sampled
from opsd.report.step_costs import collapses, cost_rows
from opsd.runs.read import Accuracy, Results, Run

# (metric, title, unit): PANELS are always in view, MORE_PANELS folded; both if recorded
PANELS, MORE_PANELS = (
    [(name, *said) for name, said in panels.items()]
    for panels in read_toml(__file__, "panels").values()
)


def page(results: Results) -> str:
    """The report as one HTML document that loads no other files."""
    runs, evaluated = results.methods, [run for run in results.methods if run.points]
    accuracy = None
    if evaluated:
        series = [accuracy_series(run) for run in evaluated]
        accuracy = accuracy_chart(series, token_axis(evaluated), references(results))
    panels, more_panels = _panels(runs, PANELS), _panels(runs, MORE_PANELS)
    charts = [*([accuracy] if accuracy else []), *panels, *more_panels]
    rollouts = [(run, sampled(run)) for run in results.runs]
    costs = [(run, cost_rows(run)) for run in runs]
    return render(
        "report.html",
        results=results,
        main=next((run for run in results.runs if run.method == "opsd"), results.runs[0]),
        legend=[Series(run.method, run.name, []) for run in runs],
        warnings=_warnings(results),
        rates=_rates(results),
        accuracy=accuracy,
        panels=panels,
        more_panels=more_panels,
        panel_notes=_panel_notes(runs, panels),
        charts={chart.identifier: chart.data for chart in charts},
        sampled=[(run, found) for run, found in rollouts if found],
        costs=[(run, rows) for run, rows in costs if rows],
        facts=_facts(results),
    )


def accuracy_series(run: Run) -> Series:
    """A run's curve of accuracy by tokens, with intervals."""
    name = run.name + (" (trained tokens)" if run.trained_axis else "")
    rates = [point.accuracy for point in run.points]
    band = [None if rate.low is None else (rate.low, rate.high) for rate in rates]
    return Series(run.method, name, [(p.x, p.accuracy.value) for p in run.points], band)


def token_axis(runs: Sequence[Run]) -> str:
    """The label of the token axis; it says that SFT counts trained instead of generated tokens."""
    if all(run.trained_axis for run in runs):
        return "trained tokens"
    if any(run.trained_axis for run in runs):
        return "generated tokens (SFT: trained tokens)"
    return "generated tokens"


def references(results: Results) -> list[tuple[str, str, float]]:
    """The chart's horizontal lines: (key, name, accuracy)."""
    lines = [
        ("teacher", "teacher", results.teacher),
        ("base", "base" if results.quickstart else "before", results.base),
        ("pretrained", "pretrained", results.pretrained),
    ]
    return [(key, name, accuracy.value) for key, name, accuracy in lines if accuracy]


def metric_series(runs: Sequence[Run], key: str) -> list[Series]:
    """A metric over steps, one series for each run that has it."""
    found = []
    for run in runs:
        points = sorted((r["step"], r[key]) for r in run.metrics if r.get(key) is not None)
        found += [Series(run.method, run.name, points)] if points else []
    return found


def _warnings(results: Results) -> list[str]:
    notes = [*collapses(results.methods), *results.troubles]
    if not results.finished:
        steps = max((r["step"] for run in results.runs for r in run.metrics), default=0)
        notes.insert(
            0,
            "There is no summary.json yet: the run is still going on, or was cut off. What follows "
            f"is what it has written so far (step {steps:g}).",
        )
    return notes


def _rates(results: Results) -> list[tuple[str, str, Accuracy, Run | None]]:
    """The rows of the table, (key, name, accuracy, run): the models that training started from,
    each method's last evaluation, and the teacher."""
    rows: list[tuple[str, str, Accuracy | None, Run | None]] = [
        ("pretrained", "Pretrained", results.pretrained, None),
        ("base", "Base" if results.quickstart else "Before", results.base, None),
    ]
    for run in results.runs:
        if run.points and (run.points[-1].x > 0 or not results.base):
            rows.append((run.method, run.name, run.points[-1].accuracy, run))
    rows.append(("teacher", "Teacher", results.teacher, None))
    return [(key, name, rate, run) for key, name, rate, run in rows if rate]


def _panels(runs: Sequence[Run], panels: Sequence[tuple[str, str, str]]) -> list[Chart]:
    """A chart for each metric that some run recorded."""
    charts = []
    for key, title, unit in panels:
        share = unit == "share"
        if series := metric_series(runs, key):
            zero = share or unit.startswith("nats")
            charts.append(
                Chart(f"panel-{key}", title, "step", unit, series, share=share, from_zero=zero)
            )
    return charts


def _panel_notes(runs: Sequence[Run], panels: Sequence[Chart]) -> list[str]:
    notes = []
    if any(len(run.metrics) >= NOISY for run in runs):
        notes.append("Faint lines are single steps, strong ones their running mean.")
    without = [run.name for run in runs if run.metrics and not metric_series([run], "divergence")]
    if without and len(without) < len(runs):
        notes.append(f"{' and '.join(without)} recorded no divergence: no teacher scores there.")
    drawn = {chart.title for chart in panels}
    if missing := [title.lower() for _, title, _ in PANELS if title not in drawn]:
        notes.append(f"Not recorded, so left out: {', '.join(missing)}.")
    return notes


def _facts(results: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of facts, (title, [(name, value)]): costs, versions and machine."""
    times = [(run.name, duration(run.seconds)) for run in results.runs if run.seconds is not None]
    costs = [] if len(times) < 2 else times
    if results.seconds is not None:
        costs.append(("In all", duration(results.seconds)))
    if results.peak_memory is not None:
        costs.append(("Peak memory", size(results.peak_memory)))
    return [
        ("Time and memory", costs),
        ("Versions", readable(results.summary.get("versions"))),
        ("Machine", readable(results.summary.get("machine"))),
    ]


def readable(content: object) -> list[tuple[str, str]]:
    """A mapping's entries as (name, text), with units for bytes and JSON for nested values."""
    if not isinstance(content, dict):
        return [("", str(content))] if content else []
    pairs = []
    for key, entry in content.items():
        if str(key).endswith("bytes") and isinstance(entry, int | float):
            entry = size(entry)
        elif not isinstance(entry, str):
            entry = json.dumps(entry, ensure_ascii=False)
        pairs.append((str(key).removesuffix("_bytes").replace("_", " "), entry))
    return pairs
