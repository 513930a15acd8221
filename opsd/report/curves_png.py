"""Draw curves.png: accuracy by tokens, divergence and entropy by step, for a README or a chat."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from opsd.report.charts import Series, short
from opsd.report.page import accuracy_series, metric_series, references, token_axis
from opsd.runs.read import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"opsd": "#0b61a4", "grpo": "#b34700", "sft": "#17803d"}
OTHER = "#8a3a86"
MARKERS = {"opsd": "o", "grpo": "s", "sft": "^"}
QUIET = "#5f6368"
STYLES = {"teacher": "--", "base": "-", "pretrained": ":"}


def write_curves(results: Results, file: IO[bytes]) -> None:
    """Draw the figure: 2000 by 840 pixels, its text legible at half that width."""
    with drawing(file, (10, 4.2), (1.35, 1), results.model) as (left, right):
        _accuracy(left, results)
        _dynamics(right, results)


@contextmanager
def drawing(
    file: IO[bytes], size: tuple[float, float], widths: Sequence[float], title: str | None = None
) -> Iterator[list["Axes"]]:
    """Yield axes side by side to draw into; then style the figure and write it to `file`, a PNG of
    200 pixels per inch. size: in inches. widths: of the axes, relative."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.parse_math": False}):  # a "$" in a name is no formula
        figure = Figure(figsize=size, dpi=200, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        panels = list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
        yield panels
        for axes in panels:
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(QUIET)
            axes.tick_params(colors=QUIET, labelsize=11)
            axes.set_xlim(left=0)
            axes.xaxis.set_major_formatter(lambda x, _: short(x))
            axes.grid(axis="y", color="#e7e7e2")
            axes.set_axisbelow(True)
            if axes.get_legend_handles_labels()[0]:
                legend = axes.legend(framealpha=0.8, edgecolor="none", fontsize=11, loc="best")
                legend.set_in_layout(False)  # a long name does not squeeze the axes
        if title is not None:
            figure.suptitle(title, fontsize=14, fontweight="bold", x=0.01, ha="left")
        figure.savefig(file, format="png", metadata={"Software": "opsd"})


def draw_accuracy(axes: "Axes", series: Sequence[Series], x_label: str) -> None:
    """Draw accuracies by tokens with their intervals."""
    for one in series:
        colour = colour_of(one)
        if len(one.known_band) > 1:
            xs, low, high = zip(*one.known_band, strict=True)
            axes.fill_between(xs, low, high, color=colour, alpha=0.14, linewidth=0)
        elif one.known_band:
            axes.vlines(*one.known_band[0], color=colour, alpha=0.5)
        xs, ys = zip(*one.points, strict=True)
        marker = MARKERS.get(one.key, "D")
        axes.plot(xs, ys, color=colour, marker=marker, linewidth=2.2, label=one.name)
    axes.set_xlabel(x_label, fontsize=12)
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")


def colour_of(series: Series) -> str:
    """The colour of a series' method, the same in every plot."""
    return COLOURS.get(series.key, OTHER)


def _accuracy(axes: "Axes", results: Results) -> None:
    runs = [run for run in results.methods if run.points]
    axes.set_title("Held-out accuracy, 95 % intervals", fontsize=12, loc="left")
    if not runs:
        _nothing(axes, "no evaluations yet")
        return
    draw_accuracy(axes, [accuracy_series(run) for run in runs], token_axis(runs))
    end = max(point.x for run in runs for point in run.points) or 1
    axes.set_xlim(0, end * 1.02)
    low, high = axes.get_ylim()
    lines = references(results)
    low, high = min([low, *(y - 0.03 for _, _, y in lines)]), max([high, *(y for _, _, y in lines)])
    axes.set_ylim(max(low, -0.02), min(high + 0.02, 1.03) if high <= 1.03 else high)
    for key, name, y in lines:
        axes.axhline(y, color=QUIET, linestyle=STYLES[key], linewidth=1.2, zorder=1)
        place: Any = ("axes fraction", "data")
        axes.annotate(name, (1.01, y), xycoords=place, color=QUIET, fontsize=11, va="center")


def _dynamics(axes: "Axes", results: Results) -> None:
    """Draw the divergence, if recorded, as solid and the student's entropy as dotted lines."""
    divergence = metric_series(results.methods, "divergence")
    entropy = metric_series(results.methods, "student_entropy")
    axes.set_title("Divergence and entropy, nats a token", fontsize=12, loc="left")
    if not divergence and not entropy:
        _nothing(axes, "no steps yet")
        return
    for found, style, what in ((divergence, "-", "divergence"), (entropy, ":", "entropy")):
        for series in found:
            xs, ys = zip(*series.trend, strict=True)
            marker = "o" if len(xs) == 1 else None
            label = f"{series.name} {what}"
            axes.plot(
                xs, ys, style, color=colour_of(series), marker=marker, linewidth=2, label=label
            )
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.set_xlabel("step", fontsize=12)


def _nothing(axes: "Axes", words: str) -> None:
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", color=QUIET, fontsize=12)
