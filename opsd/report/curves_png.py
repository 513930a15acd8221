"""curves.png: accuracy by tokens, and divergence or entropy by step, for a README or a chat."""

from typing import IO

from opsd.report.charts import Series, short, smooth
from opsd.report.page import accuracy_series, metric_series, references, token_axis
from opsd.runs.read import Results

COLOURS = {"opsd": "#0b61a4", "grpo": "#b34700", "sft": "#17803d"}
OTHER = "#8a3a86"
MARKERS = {"opsd": "o", "grpo": "s", "sft": "^"}
QUIET = "#5f6368"
STYLES = {"teacher": "--", "base": "-", "pretrained": ":"}


def write_curves(results: Results, file: IO[bytes]) -> None:
    """Draw the figure: 2000 by 840 pixels, text legible when shown at half that width."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.parse_math": False}):  # "$" in a name begins no formula
        figure = Figure(figsize=(10, 4.2), dpi=200, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
        _accuracy(left, results)
        _dynamics(right, results)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(QUIET)
            axes.tick_params(colors=QUIET, labelsize=11)
            axes.set_xlim(left=0)
            axes.xaxis.set_major_formatter(lambda x, _: short(x))
        figure.suptitle(results.model, fontsize=14, fontweight="bold", x=0.01, ha="left")
        figure.savefig(file, format="png", metadata={"Software": "opsd"})


def _accuracy(axes, results: Results) -> None:
    runs = [run for run in results.methods if run.points]
    axes.set_title("Held-out accuracy, 95 % intervals", fontsize=12, loc="left")
    if not runs:
        _nothing(axes, "no evaluations yet")
        return
    for run in runs:
        series = accuracy_series(run)
        xs, ys = zip(*series.points, strict=True)
        known = [(x, *band) for x, band in zip(xs, series.band, strict=True) if band]
        if len(known) > 1:
            at, low, high = zip(*known, strict=True)
            axes.fill_between(at, low, high, color=_colour(series), alpha=0.14, linewidth=0)
        elif known:
            axes.vlines(known[0][0], known[0][1], known[0][2], color=_colour(series), alpha=0.5)
        marker = MARKERS.get(series.key, "D")
        axes.plot(xs, ys, color=_colour(series), marker=marker, linewidth=2.2, label=series.name)
    end = max(point.x for run in runs for point in run.points) or 1
    axes.set_xlim(0, end * 1.02)
    low, high = axes.get_ylim()
    lines = references(results)
    low, high = min([low, *(y - 0.03 for _, _, y in lines)]), max([high, *(y for _, _, y in lines)])
    axes.set_ylim(max(low, -0.02), min(high + 0.02, 1.03) if high <= 1.03 else high)
    for key, name, y in lines:
        axes.axhline(y, color=QUIET, linestyle=STYLES[key], linewidth=1.2, zorder=1)
        axes.annotate(name, (1.01, y), xycoords=("axes fraction", "data"), color=QUIET,
                      fontsize=11, va="center")  # fmt: skip
    axes.set_xlabel(token_axis(runs), fontsize=12)
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
    axes.grid(axis="y", color="#e7e7e2")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=11, loc="best")


def _dynamics(axes, results: Results) -> None:
    """Divergence where it was recorded, with the student's entropy beside it as thin lines."""
    divergence = metric_series(results.methods, "divergence")
    entropy = metric_series(results.methods, "student_entropy")
    axes.set_title("Divergence and entropy, nats a token", fontsize=12, loc="left")
    if not divergence and not entropy:
        _nothing(axes, "no steps yet")
        return
    for series, style, what in [
        *((one, "-", "divergence") for one in divergence),
        *((one, ":", "entropy") for one in entropy),
    ]:
        points = smooth(series.points) if len(series.points) >= 40 else series.points
        xs, ys = zip(*points, strict=True)
        marker = "o" if len(points) == 1 else None
        axes.plot(xs, ys, style, color=_colour(series), marker=marker, linewidth=2,
                  label=f"{series.name} {what}")  # fmt: skip
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.set_xlabel("step", fontsize=12)
    axes.grid(axis="y", color="#e7e7e2")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=10, loc="best")


def _colour(series: Series) -> str:
    return COLOURS.get(series.key, OTHER)


def _nothing(axes, words: str) -> None:
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", color=QUIET, fontsize=12)
