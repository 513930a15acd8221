"""Show a comparison: as a table for the terminal, as an HTML page, and as a figure."""

# ruff: noqa: RUF001 - the dashes and signs are intended: people read them

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import IO

from opsd.common.format import duration, number, percent
from opsd.compare.comparison import Comparison, Method
from opsd.compare.ratios import CONFIDENCE, MEASURES, Interval, Ratio, Target, alike, interpolate
from opsd.report.charts import Series, accuracy_chart
from opsd.report.render import interval, render

COLUMNS: tuple[str, ...] = ("", "seeds", "accuracy at the budget", "gain", "tokens to the target")
COLUMNS += ("tokens, ratio", "time", "FLOPs")


def title(comparison: Comparison) -> str:
    """A title that says the budget and the target."""
    return f"At {_count(comparison.budget)} tokens; target {_target(comparison.target)}"


def rows(comparison: Comparison) -> list[list[str]]:
    """The table's row for each method; its columns are COLUMNS."""
    ratios = {(one.method, one.of): one for one in comparison.ratios}
    lines = []
    for method in comparison.methods:
        tokens, seconds, flops = (ratios.get((method.key, of)) for of in MEASURES)
        baseline = method.key == comparison.baseline
        line = [method.name, str(len(method.runs)), share(method.accuracy_at_budget)]
        line += [difference(method.gain_at_budget), _cost(method)]
        line.append("1 (baseline)" if baseline else _ratio(tokens))
        line.append(_beside(method.seconds_to_target, duration, seconds))
        line.append(_beside(method.flops_to_target, "{:.2e}".format, flops))
        lines.append(line)
    return lines


def seed_columns(comparison: Comparison) -> list[str]:
    """The column names of the table of seeds."""
    names = (method.name for method in comparison.methods)
    own = (column for name in names for column in (f"{name}: at the budget", "tokens"))
    return ["seed", "start", "target", *own]


def seed_rows(comparison: Comparison) -> list[list[str]]:
    """The row of each seed: its start and target, and each method's accuracy at the budget and
    tokens to the target.

    There are no rows unless all methods have the same seeds, each once."""
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
            line.append(_known(reached, _count))
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


def share(rate: Interval) -> str:
    """An accuracy in percent, with its interval if there is one."""
    known = rate.low is not None
    return f"{percent(rate.value)} ({interval(rate)})" if known else percent(rate.value)


def difference(gain: Interval) -> str:
    """A difference of accuracies in percentage points, with its interval if there is one."""
    return _with_interval(gain, lambda x: f"{100 * x:+.1f}", " to ")


def _with_interval(one: Interval, shown: Callable[[float], str], between: str = "–") -> str:
    if one.low is None or one.high is None:
        return shown(one.value)
    return f"{shown(one.value)} ({shown(one.low)}{between}{shown(one.high)})"


def _count(tokens: float) -> str:
    return number(round(tokens))


def _cost(method: Method) -> str:
    if method.tokens_to_target is None:
        return f"reached by {method.reached} of {method.asked}" if method.asked else "–"
    return _with_interval(method.tokens_to_target, _count)


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None or ratio.value is None:
        return "–"
    text = f"{'≥ ' * ratio.at_least}{_two_digits(ratio.value)} ×"
    if ratio.low is not None and not ratio.at_least:
        text += f" ({_two_digits(ratio.low)}–{_two_digits(ratio.high)})"
    if ratio.unreached:
        text += f", {len(ratio.seeds)} of {len(ratio.seeds) + len(ratio.unreached)} seeds"
    return text


def _two_digits(x: float) -> str:
    """Two significant digits, with zeros (0.70, 2.0, 11); above 99 all digits before the point."""
    return f"{x:#.2g}".rstrip(".") if abs(x) < 99.5 else f"{x:.0f}"


def _beside(value: float | None, shown: Callable[[float], str], ratio: Ratio | None) -> str:
    """The cost of reaching the target in seconds or FLOPs, with its ratio."""
    text = _known(value, shown)
    return text if ratio is None or ratio.value is None else f"{text}; {_ratio(ratio)}"


def markdown(
    columns: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str] = ()
) -> str:
    """A Markdown table followed by notes, for a README or an issue."""
    head = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([*head, *body, *(f"\n{note}" for note in notes)]) + "\n"


def series(comparison: Comparison) -> list[Series]:
    """Each method's mean curve, for a chart."""
    return [Series(one.key, one.name, one.curve, one.bands) for one in comparison.methods]


def token_axis(comparison: Comparison) -> str:
    """The label of the token axis."""
    trained = any(run.trained_axis for method in comparison.methods for run in method.runs)
    return "generated tokens (SFT: trained tokens)" if trained else "generated tokens"


def page(comparison: Comparison) -> str:
    """The comparison's page: one HTML document that loads no other files."""
    target = comparison.target.shared
    references = [] if target is None else [("base", "target", target)]
    chart = accuracy_chart(series(comparison), token_axis(comparison), references)
    seeds = seed_rows(comparison)
    return render(
        "comparison.html",
        comparison=comparison,
        title=title(comparison),
        costs=(COLUMNS, rows(comparison)),
        confidence=CONFIDENCE,
        seeds=(seed_columns(comparison), seeds) if len(seeds) > 1 else None,
        chart=chart,
        charts={chart.identifier: chart.data},
    )


def write_comparison(comparison: Comparison, file: IO[bytes]) -> None:
    """Draw comparison.png: mean curves and every seed's curve, for a README or a chat. It has 1400
    by 840 pixels; its text is legible at half that width."""
    from opsd.report.curves_png import colour_of, draw_accuracy, drawing

    with drawing(file, (7, 4.2), (1,)) as (axes,):
        means = series(comparison)
        draw_accuracy(axes, means, token_axis(comparison))
        for method, mean in zip(comparison.methods, means, strict=True):
            for run in method.runs if len(method.runs) > 1 else ():
                xs, ys = zip(*run.curve, strict=True)
                axes.plot(xs, ys, color=colour_of(mean), linewidth=0.7, alpha=0.5)
        title = "Held-out accuracy: means, 90 % intervals, and seeds"
        axes.set_title(title, fontsize=12, loc="left")
        axes.set_ylim(-0.02, 1.03)
