"""comparison.png: the mean learning curves with every seed's own, for a README or a chat."""

from typing import IO

from opsd.compare.comparison import Comparison
from opsd.compare.page import series, token_axis
from opsd.report.curves_png import colour_of, draw_accuracy, drawing


def write_comparison(comparison: Comparison, file: IO[bytes]) -> None:
    """Draw the figure: 1400 by 840 pixels, text legible when shown at half that width."""
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
