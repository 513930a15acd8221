"""A comparison for people to read: a table for the terminal, and one page."""

# ruff: noqa: RUF001 - dashes and signs for people to read are meant as such

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib import resources

from opsd.common.format import duration, number, percent
from opsd.compare.comparison import Comparison, Method
from opsd.compare.ratios import CONFIDENCE, MEASURES, Interval, Ratio, Target, alike, interpolate
from opsd.report.charts import Chart, Series, chart_data, draw, swatch
from opsd.report.markup import Html, embed_json, tag

COLUMNS = (
    "",
    "seeds",
    "accuracy at the budget",
    "gain",
    "tokens to the target",
    "tokens, ratio",
    "time",
    "FLOPs",
)


def title(comparison: Comparison) -> str:
    """What is compared, in a line."""
    return f"At {number(round(comparison.budget))} tokens; target {_target(comparison.target)}"


def rows(comparison: Comparison) -> list[list[str]]:
    """A row a method, as COLUMNS."""
    ratios = {(one.method, one.of): one for one in comparison.ratios}
    lines = []
    for method in comparison.methods:
        tokens, seconds, flops = (ratios.get((method.key, of)) for of in MEASURES)
        baseline = method.key == comparison.baseline
        lines.append(
            [
                method.name,
                str(len(method.runs)),
                share(method.at_budget),
                points(method.gain),
                _cost(method),
                "1 (baseline)" if baseline else _ratio(tokens),
                _beside(method.seconds, duration, seconds),
                _beside(method.flops, "{:.2e}".format, flops),
            ]
        )
    return lines


def seed_columns(comparison: Comparison) -> list[str]:
    """The heads of the table of seeds."""
    names = (method.name for method in comparison.methods)
    own = (column for name in names for column in (f"{name}: at the budget", "tokens"))
    return ["seed", "start", "target", *own]


def seed_rows(comparison: Comparison) -> list[list[str]]:
    """A row a seed: its target, and each method's accuracy at the budget and tokens to the target.

    Only where all methods have the same seeds, each once; otherwise no rows.
    """
    first = comparison.methods[0].runs
    if not all(alike(method.runs, first) for method in comparison.methods):
        return []
    lines = []
    for run in sorted(first, key=lambda run: run.seed):
        target = comparison.target.of(run)
        line = [str(run.seed), percent(run.curve[0][1]), _known(target, percent)]
        for method in comparison.methods:
            own = next(one for one in method.runs if one.seed == run.seed)
            reached = None if target is None else own.reaches(target)
            line.append(percent(interpolate(own.curve, comparison.budget)))
            line.append(_known(reached, lambda tokens: number(round(tokens))))
        lines.append(line)
    return lines


def _known(value: float | None, shown: Callable[[float], str]) -> str:
    return "–" if value is None else shown(value)


def _target(target: Target) -> str:
    if target.shared is not None:
        return f"{percent(target.shared)} ({target.says})"
    if not target.by_seed:
        return target.says
    low, high = min(target.by_seed.values()), max(target.by_seed.values())
    shown = percent(low) if low == high else f"{100 * low:.1f}–{percent(high)}"
    return f"{shown}: {target.says}"


def share(interval: Interval) -> str:
    """An accuracy in percent, with its interval where there is one."""
    if interval.low is None:
        return percent(interval.value)
    low, high = max(0.0, interval.low), min(1.0, interval.high)
    return f"{percent(interval.value)} ({100 * low:.1f}–{100 * high:.1f})"


def points(gain: Interval) -> str:
    """A difference of accuracies in points, with its interval where there is one."""
    if gain.low is None:
        return f"{100 * gain.value:+.1f}"
    return f"{100 * gain.value:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"


def _cost(method: Method) -> str:
    if method.cost is None:
        return f"reached by {method.reached} of {method.asked}"
    text = number(round(method.cost.value))
    if method.cost.low is None:
        return text
    return f"{text} ({number(round(method.cost.low))}–{number(round(method.cost.high))})"


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None or ratio.value is None:
        return "–"
    if ratio.at_least:
        text = f"≥ {_two_digits(ratio.value)} ×"
    elif ratio.low is None:
        text = f"{_two_digits(ratio.value)} ×"
    else:
        low, high = _two_digits(ratio.low), _two_digits(ratio.high)
        text = f"{_two_digits(ratio.value)} × ({low}–{high})"
    if ratio.unreached:
        text += f", {len(ratio.seeds)} of {len(ratio.seeds) + len(ratio.unreached)} seeds"
    return text


def _two_digits(x: float) -> str:
    """The significant ones, zeros too: 0.70, 2.0, 11; of what is larger, all before the point."""
    return f"{x:#.2g}".rstrip(".") if abs(x) < 99.5 else f"{x:.0f}"


def _beside(value: float | None, shown: Callable[[float], str], ratio: Ratio | None) -> str:
    """What the target costs in another measure, and the ratio of that."""
    text = _known(value, shown)
    return text if ratio is None or ratio.value is None else f"{text}; {_ratio(ratio)}"


def markdown(
    columns: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str] = ()
) -> str:
    """A table with its notes, for a README or an issue."""
    head = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([*head, *body, *(f"\n{note}" for note in notes)]) + "\n"


def page(comparison: Comparison) -> str:
    """The page: one HTML document that loads nothing."""
    chart = _chart(comparison)
    return document(
        " · ".join(method.name for method in comparison.methods),
        title(comparison),
        [
            _cost_section(comparison),
            _seeds(comparison),
            _curves(comparison, chart),
            _ran(comparison),
        ],
        embed_json({chart.identifier: chart_data(chart)}, "charts"),
    )


def document(heading: str, below: str, sections: list[Html], data: Html) -> str:
    """An HTML document in the report's style: a heading, a line below it, sections, chart data."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", "opsd compare"),
        tag("style", Html(_asset("report.css"))),
    )
    header = tag(
        "header",
        tag("p", "opsd compare", class_="eyebrow"),
        tag("h1", heading),
        tag("p", below, class_="quiet"),
    )
    body = tag(
        "body",
        header,
        tag("main", sections),
        tag("footer", tag("p", f"Written {time.strftime('%Y-%m-%d %H:%M')} by opsd compare.")),
        tag("div", id="tip", role="tooltip", hidden=True),
        data,
        tag("script", Html(_asset("report.js"))),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Html:
    """A table that scrolls where it is too wide; each line's first cell is its heading."""
    head = tag("tr", [tag("th", column, scope="col") for column in columns])
    body = [
        tag("tr", tag("th", line[0], scope="row"), [tag("td", cell) for cell in line[1:]])
        for line in lines
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", body)), class_="scroll")


def _cost_section(comparison: Comparison) -> Html:
    confidence = f"{100 * CONFIDENCE:.0f} %"
    explained = (
        f"In brackets: {confidence} intervals over seeds (Student's t; of tokens and ratios on "
        "logarithms). The gain, in points, is over what a run started from. The ratio is the "
        "baseline's tokens over the method's, paired by seed where both have the same seeds; ≥ "
        "where a run of the baseline never got there. Time and FLOPs are those to the target, with "
        "their own ratios; FLOPs count the products with the weights in generation, the teacher's "
        "pass and the student's, not evaluation or attention."
    )
    return tag(
        "section",
        tag("h2", "What the target costs"),
        table(COLUMNS, rows(comparison)),
        [tag("p", note, class_="warning") for note in comparison.notes],
        tag("p", explained, class_="note"),
        id="cost",
    )


def _seeds(comparison: Comparison) -> Html:
    lines = seed_rows(comparison)
    if len(lines) < 2:
        return Html("")
    columns = seed_columns(comparison)
    return tag("section", tag("h2", "Seed by seed"), table(columns, lines), id="seeds")


def _chart(comparison: Comparison) -> Chart:
    trained = any(run.trained_axis for method in comparison.methods for run in method.runs)
    target = comparison.target.shared
    series = [
        Series(method.key, method.name, method.curve, method.bands) for method in comparison.methods
    ]
    return Chart(
        "accuracy",
        "Accuracy",
        "generated tokens (SFT: trained tokens)" if trained else "generated tokens",
        "held-out accuracy",
        series,
        references=[] if target is None else [("base", "target", target)],
        y_format=lambda y: f"{100 * y:.3g} %",
        y_limits=(0.0, 1.0),
        markers=True,
        y_title=True,
    )


def _curves(comparison: Comparison, chart: Chart) -> Html:
    keys = [tag("span", swatch(method.key), method.name) for method in comparison.methods]
    return tag(
        "section",
        tag("h2", "Learning curves"),
        tag("p", keys, class_="key"),
        tag("div", draw(chart, 336, 250, "narrow"), draw(chart, 880, 380, "wide")),
        tag("p", "Means over the seeds, as far as all of a method's seeds go.", class_="note"),
        id="curves",
    )


def _ran(comparison: Comparison) -> Html:
    boxes = []
    for method in comparison.methods:
        facts = [
            (
                tag("dt", "–" if run.seed is None else f"seed {run.seed}"),
                tag("dd", f"{run.path}: {number(round(run.budget))} tokens, ends at "
                    f"{percent(run.curve[-1][1])}"),
            )
            for run in method.runs
        ]  # fmt: skip
        boxes.append(tag("div", tag("h3", method.name), tag("dl", facts)))
    return tag("section", tag("h2", "Runs"), tag("div", boxes, class_="facts"), id="runs")


def _asset(name: str) -> str:
    return resources.files("opsd.report").joinpath("templates", name).read_text(encoding="utf-8")
