"""The report's page, top to bottom: result, accuracy, training, rollouts, what ran."""

# ruff: noqa: RUF001 - dashes and minus signs for people to read are meant as such

import json
import time
from collections.abc import Callable
from importlib import resources

from opsd.common.format import duration, number, percent, size
from opsd.report.charts import Chart, Series, chart_data, draw, interval_bar, swatch
from opsd.report.markup import Html, embed_json, tag
from opsd.report.rollouts import rollout_section
from opsd.report.step_costs import collapses, cost_section
from opsd.runs.read import Accuracy, Results, Run, value

# (metric, title, unit): the first three are always there, others where the run recorded them
PANELS = [
    ("divergence", "Divergence", "nats a token"),
    ("student_entropy", "Student's entropy", "nats a token"),
    ("rollout_length", "Rollout length", "tokens"),
]
MORE_PANELS = [
    ("correct_fraction", "Rollouts that are right", "share"),
    ("pass_at_k", "Problems with a right rollout (pass@k)", "share"),
    ("reward", "Reward", "mean"),
    ("truncated_fraction", "Rollouts cut at the length limit", "share"),
    ("teacher_entropy", "Teacher's entropy", "nats a token"),
    ("clipped_fraction", "Clipped tokens", "share"),
    ("inverted_gradient_fraction", "Tokens whose clipped gradient points away", "share"),
    ("divergence_maths", "Divergence of mathematical tokens", "nats a token"),
    ("divergence_style", "Divergence of words about thinking", "nats a token"),
    ("importance_ratio", "Student's probability ÷ the engine's", "mean"),
    ("engine_divergence", "The engine's difference from the student", "nats a token"),
    ("token_ratio", "Tokens saved by shared contexts", "times fewer"),
    ("loss", "Loss", "as optimised"),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("learning_rate", "Learning rate", "per step"),
    ("tokens_per_second", "Speed", "tokens/s"),
]


def page(results: Results) -> str:
    """The whole report as one HTML document that loads nothing."""
    charts: list[Chart] = []
    body = [
        _header(results),
        tag("main", _headline(results), _accuracy(results, charts), _training(results, charts),
            _rollouts(results), cost_section(results.methods), _what_ran(results)),
        _footer(results),
        tag("div", id="tip", role="tooltip", hidden=True),
        embed_json({chart.identifier: chart_data(chart) for chart in charts}, "charts"),
        tag("script", Html(_asset("report.js"))),
    ]  # fmt: skip
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{results.model} · OPSD report"),
        tag("style", Html(_asset("report.css"))),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', body), lang='en')}\n"


def accuracy_series(run: Run) -> Series:
    """A run's accuracy by tokens, with its intervals."""
    name = run.name + (" (trained tokens)" if run.trained_axis else "")
    band = [
        None if p.accuracy.low is None else (p.accuracy.low, p.accuracy.high) for p in run.points
    ]
    return Series(run.method, name, [(p.x, p.accuracy.value) for p in run.points], band)


def token_axis(runs: list[Run]) -> str:
    """The label of the token axis; SFT counts other tokens than the rest, and the label says so."""
    if all(run.trained_axis for run in runs):
        return "trained tokens"
    if any(run.trained_axis for run in runs):
        return "generated tokens (SFT: trained tokens)"
    return "generated tokens"


def references(results: Results) -> list[tuple[str, str, float]]:
    """Horizontal lines: (key, name, accuracy)."""
    lines = [
        ("teacher", "teacher", results.teacher),
        ("base", "base" if results.quickstart else "before", results.base),
        ("pretrained", "pretrained", results.pretrained),
    ]
    return [(key, name, accuracy.value) for key, name, accuracy in lines if accuracy]


def metric_series(runs: list[Run], key: str) -> list[Series]:
    """A metric over steps, one series a run that has it."""
    found = []
    for run in runs:
        points = [
            (step, y)
            for record in run.metrics
            if (step := value(record, "step")) is not None and (y := value(record, key)) is not None
        ]
        if points:
            found.append(Series(run.method, run.name, sorted(points)))
    return found


def _header(results: Results) -> Html:
    kind = "opsd quickstart" if results.quickstart else "opsd train"
    facts = [kind, ", ".join(run.name for run in results.methods)]
    if results.problems:
        facts.append(f"{results.problems:,} held-out problems")
    if results.summary.get("seed") is not None:
        facts.append(f"seed {results.summary['seed']}")
    notes = [*collapses(results.methods), *results.troubles]
    if not results.finished:
        steps = max((value(r, "step") or 0 for run in results.runs for r in run.metrics), default=0)
        notes.insert(
            0,
            "There is no summary.json yet: the run is still going on, or was cut off. What follows "
            f"is what it has written so far (step {steps:g}).",
        )
    return tag(
        "header",
        tag("p", "On-policy self-distillation", class_="eyebrow"),
        tag("h1", results.model),
        tag("p", " · ".join(filter(None, facts)), class_="quiet"),
        [tag("p", note, class_="warning", role="status") for note in notes],
    )


def _headline(results: Results) -> Html:
    run = next((r for r in results.runs if r.method == "opsd"), results.runs[0])
    after = _final(run)
    tiles = []
    if results.base and after and run.points[-1].x > 0:
        points = 100 * (after.value - results.base.value)
        tiles.append(
            tag("div",
                tag("p", f"Held-out accuracy, {'base' if results.quickstart else 'before'} → "
                    f"{'after ' + run.name if results.quickstart else 'after'}", class_="quiet"),
                tag("p", percent(results.base.value), tag("span", " → ", class_="quiet"),
                    tag("strong", percent(after.value)), class_="big"),
                tag("p", _points(points), " points", _interval_words(results.base, after),
                    class_="quiet"),
                class_="result")
        )  # fmt: skip
    elif results.base:
        tiles.append(_tile("Held-out accuracy at the start", percent(results.base.value)))
    axis = "trained" if run.trained_axis else "generated"
    if run.tokens is not None:
        of = f" by {run.name}" if results.quickstart else ""
        tiles.append(_tile(f"Tokens {axis}{of}", number(round(run.tokens))))
    if results.seconds is not None:
        tiles.append(_tile("Time in all", duration(results.seconds)))
    if results.peak_memory is not None:
        tiles.append(_tile("Peak memory", size(results.peak_memory)))
    if results.teacher:
        tiles.append(_tile("Teacher, with the solution", percent(results.teacher.value)))
    return tag(
        "section",
        tag("h2", "Result"),
        tag("div", tiles, class_="tiles") if tiles else None,
        None if after else tag("p", "There are no evaluations yet.", class_="note"),
        _result_table(results),
        id="result",
    )


def _interval_words(before: Accuracy, after: Accuracy) -> str:
    if before.low is None or after.low is None:
        return ""
    spans = [f"{100 * a.low:.1f}–{100 * a.high:.1f} %" for a in (before, after)]
    return f"; 95 % intervals {spans[0]} → {spans[1]}"


def _points(change: float) -> str:
    return f"{change:+.1f}".replace("-", "−")


def _tile(label: str, content: str) -> Html:
    return tag("div", tag("p", label, class_="quiet"), tag("p", content, class_="figure"))


def _result_table(results: Results) -> Html | None:
    """Every accuracy with its interval: the starting points, then each method at its end."""
    rows = []
    starts = (
        ("pretrained", "Pretrained", results.pretrained),
        ("base", "Base" if results.quickstart else "Before", results.base),
    )
    for key, name, accuracy in starts:
        if accuracy:
            rows.append(_row(key, name, accuracy, None, None, None))
    for run in results.runs:
        accuracy = _final(run)
        if accuracy and (run.points[-1].x > 0 or not results.base):
            change = accuracy.value - results.base.value if results.base else None
            rows.append(_row(run.method, run.name, accuracy, change, run, run.seconds))
    if results.teacher:
        rows.append(_row("teacher", "Teacher", results.teacher, None, None, None))
    if not rows:
        return None
    columns = ("", "Accuracy", "95 % interval", "0 – 100 %", "Change", "Tokens", "Time")
    head = tag("tr", [tag("th", column, scope="col") for column in columns])
    caption = (
        "Accuracy on the held-out problems at the end of training (the last evaluation, not the "
        "best). The Wilson interval is what the choice of problems leaves open; it does not cover "
        "the choice of the seed."
    )
    return tag(
        "div",
        tag("table", tag("thead", head), tag("tbody", rows), class_="results"),
        tag("p", caption, class_="note"),
        class_="scroll",
    )


def _row(
    key: str,
    name: str,
    accuracy: Accuracy,
    change: float | None,
    run: Run | None,
    seconds: float | None,
) -> Html:
    known = accuracy.low is not None
    tokens = "" if run is None or run.tokens is None else number(round(run.tokens))
    cells = [
        tag("th", name, scope="row"),
        tag("td", percent(accuracy.value)),
        tag("td", f"{100 * accuracy.low:.1f}–{100 * accuracy.high:.1f}" if known else "–"),
        tag("td", interval_bar(key, accuracy.value, accuracy.low, accuracy.high)),
        tag("td", "" if change is None else _points(100 * change)),
        tag("td", tokens + (" (trained)" if tokens and run and run.trained_axis else "")),
        tag("td", "" if seconds is None else duration(seconds)),
    ]
    return tag("tr", cells)


def _accuracy(results: Results, charts: list[Chart]) -> Html:
    runs = [run for run in results.methods if run.points]
    if not runs:
        return _left_out("accuracy", "Accuracy", "No evaluation of the student was written.")
    axis = token_axis(runs)
    chart = Chart(
        "accuracy",
        "Accuracy",
        axis,
        "held-out accuracy",
        [accuracy_series(run) for run in runs],
        references=references(results),
        y_format=lambda y: f"{100 * y:.3g} %",
        y_limits=(0.0, 1.0),
        markers=True,
        y_title=True,
    )
    charts.append(chart)
    note = "Bands: 95 % Wilson intervals."
    if results.teacher:
        note += " The teacher answers with the reference solution in its prompt."
    if any(run.trained_axis for run in runs) and len(runs) > 1:
        note += " SFT generates nothing, so its axis is the tokens it was trained on."
    return tag(
        "section",
        tag("h2", "Accuracy against ", axis.split(" (")[0]),
        _key(runs) if len(runs) > 1 else None,
        tag("div", draw(chart, 336, 250, "narrow"), draw(chart, 880, 380, "wide")),
        tag("p", note, class_="note"),
        id="accuracy",
    )


def _training(results: Results, charts: list[Chart]) -> Html:
    panels, missing = _panels(results.methods, PANELS, charts)
    more, _ = _panels(results.methods, MORE_PANELS, charts)
    if not panels and not more:
        return _left_out("training", "Training", "No steps were written to metrics.jsonl.")
    notes = []
    if any(len(run.metrics) >= 40 for run in results.methods):
        notes.append("Faint lines are single steps, strong ones their running mean.")
    without = [run.name for run in results.methods if run.metrics and _no_divergence(run)]
    if without and len(without) < len(results.methods):
        notes.append(f"{' and '.join(without)} recorded no divergence: no teacher scores there.")
    if missing:
        notes.append(f"Not recorded, so left out: {', '.join(missing)}.")
    open_more = tag(
        "details", tag("summary", "More of what was recorded"), tag("div", more, class_="panels")
    )
    return tag(
        "section",
        tag("h2", "Training, step by step"),
        _key(results.methods) if len(results.methods) > 1 else None,
        tag("div", panels, class_="panels"),
        tag("p", " ".join(notes), class_="note") if notes else None,
        open_more if more else None,
        id="training",
    )


def _no_divergence(run: Run) -> bool:
    return not any(value(record, "divergence") is not None for record in run.metrics)


def _panels(
    runs: list[Run], panels: list[tuple[str, str, str]], charts: list[Chart]
) -> tuple[list[Html], list[str]]:
    """The panels that have data, and the titles of those that have none."""
    drawn, missing = [], []
    for key, title, unit in panels:
        series = metric_series(runs, key)
        if not series:
            missing.append(title.lower())
            continue
        share = unit == "share"
        lowest = min(y for one in series for _, y in one.points)
        y_format: Callable[[float], str] = (lambda y: f"{100 * y:.3g} %") if share else _tick
        limits = (0.0 if lowest >= 0 else None, 1.0 if share else None)
        chart = Chart(
            f"panel-{key}",
            title,
            "step",
            unit,
            series,
            y_format=y_format,
            y_limits=limits,
            from_zero=share or unit.startswith("nats"),
        )
        charts.append(chart)
        heading = tag("h3", title, tag("span", " ", unit, class_="quiet"))
        drawn.append(tag("div", heading, draw(chart, 336, 190), class_="panel"))
    return drawn, missing


def _tick(y: float) -> str:
    return f"{y:,.0f}" if abs(y) >= 1000 else f"{y:.4g}"


def _key(runs: list[Run]) -> Html:
    items = [tag("span", swatch(run.method), run.name) for run in runs]
    return tag("p", items, class_="key")


def _rollouts(results: Results) -> Html:
    sections = [(run, rollout_section(run)) for run in results.runs]
    sections = [(run, section) for run, section in sections if section]
    if not sections:
        return _left_out("rollouts", "Rollouts", "No sample rollouts were written.")
    if len(sections) == 1:
        content: list[Html] = [sections[0][1]]
    else:  # one method at a time; without scripts they all open and close by themselves
        content = [
            tag(
                "details",
                tag("summary", swatch(run.method), run.name),
                section,
                open=i == 0,
                name="rollouts",
            )
            for i, (run, section) in enumerate(sections)
        ]
    return tag("section", tag("h2", "The same problems before and after"), content, id="rollouts")


def _what_ran(results: Results) -> Html:
    parts = [tag("h2", "What ran")]
    times = [(run.name, duration(run.seconds)) for run in results.runs if run.seconds is not None]
    costs = [] if len(times) < 2 else times
    if results.seconds is not None:
        costs.append(("In all", duration(results.seconds)))
    if results.peak_memory is not None:
        costs.append(("Peak memory", size(results.peak_memory)))
    groups = [
        ("Time and memory", costs),
        ("Versions", _pairs(results.summary.get("versions"))),
        ("Machine", _pairs(results.summary.get("machine"))),
    ]
    boxes = [tag("div", tag("h3", title), _facts(pairs)) for title, pairs in groups if pairs]
    parts.append(tag("div", boxes, class_="facts") if boxes else None)
    missing = [title.lower() for title, pairs in groups if not pairs]
    if missing:
        parts.append(tag("p", f"Not written by this run: {', '.join(missing)}.", class_="note"))
    if results.config is None:
        parts.append(tag("p", "There is no config.yaml in this directory.", class_="note"))
    else:
        code = tag("pre", tag("code", results.config.strip()), tabindex=0)
        parts.append(tag("details", tag("summary", "Resolved configuration"), code, open=True))
    return tag("section", parts, id="ran")


def _pairs(content: object) -> list[tuple[str, str]]:
    """A mapping's entries as text, bytes and nested values made readable."""
    if not isinstance(content, dict):
        return [("", str(content))] if content else []
    pairs = []
    for key, entry in content.items():
        if str(key).endswith("bytes") and value(content, key) is not None:
            entry = size(entry)
        elif not isinstance(entry, str):
            entry = json.dumps(entry, ensure_ascii=False)
        pairs.append((str(key).removesuffix("_bytes").replace("_", " "), entry))
    return pairs


def _facts(pairs: list[tuple[str, str]]) -> Html:
    return tag("dl", [(tag("dt", key), tag("dd", content)) for key, content in pairs])


def _left_out(identifier: str, title: str, why: str) -> Html:
    return tag("section", tag("h2", title), tag("p", why, class_="note"), id=identifier)


def _footer(results: Results) -> Html:
    written = time.strftime("%Y-%m-%d %H:%M")
    return tag("footer", tag("p", f"Written {written} by opsd report from {results.path.name}."))


def _final(run: Run) -> Accuracy | None:
    return run.points[-1].accuracy if run.points else None


def _asset(name: str) -> str:
    return resources.files("opsd.report").joinpath("templates", name).read_text(encoding="utf-8")
