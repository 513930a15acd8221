"""Line charts: their data, and positions in an SVG.

`templates/charts.html` draws them as inline SVG, so they show without scripts; report.js shows
values under the pointer. A chart is drawn at the size at which it is shown (CSS pixels), because
text in a scaled SVG is unreadable on a phone. The style sheet has the colours: `series-<key>`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_POINTS = 500  # longer series are thinned: no screen shows more points
NOISY = 40  # series of at least this many points get a running mean

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A line of a chart. points: (x, y), sorted by x. band: (low, high) of each point, or empty."""

    key: str  # decides the colour and the marker
    name: str
    points: Points
    band: Sequence[tuple[float, float] | None] = ()

    @property
    def known_band(self) -> list[tuple[float, float, float]]:
        """(x, low, high) of the points that have an interval."""
        pairs = zip(self.points, self.band, strict=False)
        return [(x, *interval) for (x, _), interval in pairs if interval]

    @property
    def noisy(self) -> bool:
        return len(self.points) >= NOISY

    @property
    def trend(self) -> Points:
        """The points, or their running mean if there are many."""
        return smooth(self.points) if self.noisy else self.points


@dataclass(frozen=True)
class Chart:
    """A chart's content, in data units; `scale` gives positions for a size."""

    identifier: str
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    references: Sequence[tuple[str, str, float]] = ()  # horizontal lines: (key, name, y)
    share: bool = False  # y is a share, shown in percent and never above 100 %
    from_zero: bool = False
    large: bool = False  # points have markers, and the y label is in the chart

    def say(self, y: float) -> str:
        """A value of the y axis as text."""
        if self.share:
            return f"{100 * y:.3g} %"
        return f"{y:,.0f}" if abs(y) >= 1000 else f"{y:.4g}"

    @property
    def description(self) -> str:
        """The chart in words, for screen readers."""
        lines = [f"{self.title}: {self.y_label} against {self.x_label}."]
        for series in self.series:
            (x0, y0), (x1, y1) = series.points[0], series.points[-1]
            start = f"{series.name}: {self.say(y0)} at {x0:,.0f}"
            lines.append(start + (f", {self.say(y1)} at {x1:,.0f}." if x1 != x0 else "."))
        lines += [f"{name}: {self.say(y)}." for _, name, y in self.references]
        return " ".join(lines)

    @property
    def data(self) -> dict[str, Any]:
        """The values that report.js shows under the pointer."""
        series = []
        for one in self.series:
            bands = one.band or [None] * len(one.points)
            pairs = [[*point, *(band or ())] for point, band in zip(one.points, bands, strict=True)]
            series.append({"key": one.key, "name": one.name, "points": thin(pairs)})
        return {"x": self.x_label, "percent": self.share, "series": series}

    def scale(self, width: int, height: int) -> "Scale":
        """Positions in an SVG of this size, in pixels."""
        return Scale(self, width, height)


def accuracy_chart(
    series: Sequence[Series], x_label: str, references: Sequence[tuple[str, str, float]]
) -> Chart:
    """The chart of held-out accuracy by tokens, for the report and for a comparison."""
    label = "held-out accuracy"
    return Chart("accuracy", "Accuracy", x_label, label, series, references, share=True, large=True)


class Scale:
    """A chart's margins and ticks, and the pixel positions of values. The x axis begins at 0."""

    def __init__(self, chart: Chart, width: int, height: int) -> None:
        self.left, self.right = 46, width - (72 if chart.references else 12)
        self.top, self.bottom = 26 if chart.large else 10, height - 40
        self.references = chart.references
        self.x_end = max(x for one in chart.series for x, _ in one.points) or 1
        self.x_ticks = [x for x in ticks(0, self.x_end, 4 if width < 480 else 6) if x <= self.x_end]
        ys = [y for one in chart.series for _, y in one.points]
        ys += [y for one in chart.series for _, *band in one.known_band for y in band]
        ys += [y for _, _, y in chart.references] + ([0.0] if chart.from_zero else [])
        low, high = min(ys), max(ys)
        pad = (high - low) * 0.06 or abs(high) * 0.1 or 0.1
        # The margin ends at the limits of possible values: a share's axis never shows 105 %.
        floor = 0.0 if low >= 0 else -math.inf
        ceiling = max(1.0, high) if chart.share else math.inf
        low, high = max(low - pad, floor), min(high + pad, ceiling)
        self.y_ticks = [
            y
            for y in ticks(low, high, 5 if chart.references else 4)
            if (y >= low or floor < 0) and (y <= high or ceiling == math.inf)
        ]
        self.y_low, self.y_high = min(self.y_ticks[0], low), max(self.y_ticks[-1], high)

    def x(self, x: float) -> float:
        return round(self.left + x / self.x_end * (self.right - self.left), 1)

    def y(self, y: float) -> float:
        part = (y - self.y_low) / (self.y_high - self.y_low)
        return round(self.bottom - part * (self.bottom - self.top), 1)

    def path(self, points: Points) -> str:
        """An SVG path along the points."""
        return "M" + "L".join(f"{self.x(x)} {self.y(y)}" for x, y in thin(points))

    def outline(self, band: Sequence[tuple[float, float, float]]) -> str:
        """An SVG path around a band: along its upper ends and back along the lower ones."""
        upper = [f"{self.x(x)} {self.y(high)}" for x, _, high in band]
        lower = [f"{self.x(x)} {self.y(low)}" for x, low, _ in reversed(band)]
        return f"M{'L'.join([*upper, *lower])}Z"

    @property
    def reference_lines(self) -> list[tuple[str, str, float, float]]:
        """(key, name, y of the line, y of its name) in pixels; names are moved not to overlap."""
        lines, lowest = [], self.top - 10.0
        for key, name, y in sorted(self.references, key=lambda one: -one[2]):
            lowest = max(self.y(y) + 4, lowest + 14)
            lines.append((key, name, self.y(y), lowest))
        return lines


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values that cover low…high in about `count` steps of 1, 2 or 5 times a power of 10."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def thin(points: Sequence, most: int = MAX_POINTS) -> list:
    """At most `most` of the points, evenly spaced, including the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def smooth(points: Points) -> list[tuple[float, float]]:
    """Centred running mean over about a 15th of the points, over fewer at the ends."""
    half = max(len(points) // 30, 1)
    ys = [y for _, y in points]
    near = [ys[max(i - half, 0) : i + half + 1] for i in range(len(ys))]
    return [(x, sum(some) / len(some)) for (x, _), some in zip(points, near, strict=True)]


def short(x: float) -> str:
    """A tick's number: 25000 → "25k"."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= limit:
            return f"{x / limit:g}{suffix}"
    return f"{x:g}"
