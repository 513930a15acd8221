"""comparison.png: the mean learning curves with every seed's own, for a README or a chat."""

from typing import IO

from opsd.compare.comparison import Comparison
from opsd.report.charts import short
from opsd.report.curves_png import COLOURS, MARKERS, OTHER, QUIET


def write_comparison(comparison: Comparison, file: IO[bytes]) -> None:
    """Draw the figure: 1400 by 840 pixels, text legible when shown at half that width."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=200, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for method in comparison.methods:
        colour = COLOURS.get(method.key, OTHER)
        xs, ys = zip(*method.curve, strict=True)
        known = [(x, *band) for x, band in zip(xs, method.bands, strict=True) if band]
        if known:
            at, low, high = zip(*known, strict=True)
            axes.fill_between(at, low, high, color=colour, alpha=0.12, linewidth=0)
        for run in method.runs if len(method.runs) > 1 else ():
            axes.plot(*zip(*run.curve, strict=True), color=colour, linewidth=0.7, alpha=0.5)
        marker = MARKERS.get(method.key, "D")
        axes.plot(xs, ys, color=colour, marker=marker, linewidth=2.2, label=method.name)
    trained = any(run.trained_axis for method in comparison.methods for run in method.runs)
    axes.set_title("Held-out accuracy: means, 90 % intervals, and seeds", fontsize=12, loc="left")
    axes.set_xlabel("generated tokens" + (" (SFT: trained)" if trained else ""), fontsize=12)
    axes.set_xlim(left=0)
    axes.set_ylim(-0.02, 1.03)
    axes.xaxis.set_major_formatter(lambda x, _: short(x))
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelsize=11)
    axes.grid(axis="y", color="#e7e7e2")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=11, loc="best")
    figure.savefig(file, format="png", metadata={"Software": "opsd"})
