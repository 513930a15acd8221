"""Line charts as inline SVG: they show without scripts, and report.js adds read-outs.

A chart is drawn at the size at which it is shown (CSS pixels), because text in a
scaled SVG is unreadable on a phone. Colours come from the style sheet: `series-<name>` classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from opsd.report.markup import Html, tag

MARKERS = {"opsd": "circle", "grpo": "square", "sft": "triangle"}
MAX_POINTS = 500  # a series of more points is thinned: no screen shows them


@dataclass(frozen=True)
class Series:
    """One line. `points` are (x, y) by x; `band` (low, high) an interval for each, or empty."""

    key: str  # names the colour class and the marker
    name: str
    points: list[tuple[float, float]]
    band: list[tuple[float, float] | None] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """What to draw, in data units, without a size."""

    identifier: str
    title: str
    x_label: str
    y_label: str
    series: list[Series]
    references: list[tuple[str, str, float]] = field(default_factory=list)  # (key, name, y)
    y_format: Callable[[float], str] = lambda y: f"{y:g}"
    y_limits: tuple[float | None, float | None] = (None, None)  # never drawn beyond these
    markers: bool = False
    from_zero: bool = False
    y_title: bool = False  # the y label in the chart, where no heading says it


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values, in steps of 1, 2 or 5 times 10ⁿ, that cover low…high in about `count` steps."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thin(points: Sequence, most: int = MAX_POINTS) -> list:
    """At most `most` of the points, evenly, with the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Centred running mean over about a 15th of the points; the ends average over what is there."""
    half = max(len(points) // 30, 1)
    ys = [y for _, y in points]
    return [
        (x, sum(near) / len(near))
        for i, (x, _) in enumerate(points)
        for near in [ys[max(i - half, 0) : i + half + 1]]
    ]


def short(x: float) -> str:
    """A tick's number: 25000 → "25k"."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= limit:
            return f"{x / limit:g}{suffix}"
    return f"{x:g}"


def chart_data(chart: Chart) -> dict:
    """What report.js needs for read-outs."""
    return {
        "x": chart.x_label,
        "percent": chart.y_format(0.5).endswith("%"),
        "series": [
            {
                "key": series.key,
                "name": series.name,
                "points": [
                    [x, y, *(band or ())]
                    for (x, y), band in thin(list(zip(series.points, _bands(series), strict=True)))
                ],
            }
            for series in chart.series
        ],
    }


def draw(chart: Chart, width: int, height: int, class_: str = "") -> Html:
    """The chart as an SVG of `width` by `height` pixels."""
    left, right, bottom = 46, 72 if chart.references else 12, 40
    top = 26 if chart.y_title else 10
    xs = [x for series in chart.series for x, _ in series.points]
    ys = [y for series in chart.series for _, y in series.points]
    ys += [y for series in chart.series for band in series.band if band for y in band]
    ys += [y for _, _, y in chart.references] + ([0.0] if chart.from_zero else [])
    x0, x1 = 0, max(xs) or 1  # steps and tokens both count from 0
    x_ticks = [x for x in ticks(x0, x1, 4 if width < 480 else 6) if x <= x1]
    y0, y1 = _padded(min(ys), max(ys), chart.y_limits)
    y_ticks = [
        y
        for y in ticks(y0, y1, 5 if chart.references else 4)
        if _within(y, (y0, y1), chart.y_limits)
    ]
    y0, y1 = min(y_ticks[0], y0), max(y_ticks[-1], y1)

    def px(x: float) -> float:
        return round(left + (x - x0) / (x1 - x0) * (width - left - right), 1)

    def py(y: float) -> float:
        return round(height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom), 1)

    parts: list[Html] = []
    for y in y_ticks:
        parts.append(tag("line", class_="grid", x1=left, x2=width - right, y1=py(y), y2=py(y)))
        label = {"class_": "tick", "x": left - 6, "y": py(y) + 4, "text_anchor": "end"}
        parts.append(tag("text", chart.y_format(y), **label))
    for x in x_ticks:
        anchor = "end" if px(x) > width - 24 else "middle"
        at = {
            "class_": "tick",
            "x": px(x) + (8 if anchor == "end" else 0),
            "y": height - bottom + 17,
        }
        parts.append(tag("text", short(x), text_anchor=anchor, **at))
    axis = {"class_": "axis", "x1": left, "x2": width - right}
    parts.append(tag("line", y1=height - bottom, y2=height - bottom, **axis))
    centre = (left + width - right) / 2
    parts.append(
        tag("text", chart.x_label, class_="label", x=centre, y=height - 6, text_anchor="middle")
    )
    if chart.y_title:
        parts.append(tag("text", chart.y_label, class_="label", x=0, y=12))
    for series in chart.series:
        parts.extend(_band(series, px, py))
    lowest = float(top - 10)
    for key, name, y in sorted(chart.references, key=lambda reference: -reference[2]):
        line = {"class_": f"reference ref-{key}", "x1": left, "x2": width - right}
        parts.append(tag("line", y1=py(y), y2=py(y), **line))
        lowest = max(py(y) + 4, lowest + 14)  # names in the margin do not cover each other
        parts.append(tag("text", name, class_="refname", x=width - right + 7, y=lowest))
    for series in chart.series:
        parts.extend(_line(chart, series, px, py))
    cursor = {"class_": "cursor", "x1": 0, "x2": 0, "y1": top, "y2": height - bottom}
    parts.append(tag("line", **cursor))
    return tag(
        "svg",
        parts,
        class_=f"chart {class_}".strip(),
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        tabindex=0,
        aria_label=describe(chart),
        data_chart=chart.identifier,
        data_x=f"{x0} {x1} {left} {width - right}",
    )


def describe(chart: Chart) -> str:
    """The chart in words, for those who do not see it."""
    lines = [f"{chart.title}: {chart.y_label} against {chart.x_label}."]
    for series in chart.series:
        (x0, y0), (x1, y1) = series.points[0], series.points[-1]
        start = f"{series.name}: {chart.y_format(y0)} at {x0:,.0f}"
        lines.append(start + (f", {chart.y_format(y1)} at {x1:,.0f}." if x1 != x0 else "."))
    lines += [f"{name}: {chart.y_format(y)}." for _, name, y in chart.references]
    return " ".join(lines)


def interval_bar(
    key: str, value: float, low: float | None, high: float | None, width: int = 150
) -> Html:
    """A rate in 0…1 with its interval on a line from 0 to 100 %, for a table's row."""
    height, pad = 18, 6

    def px(x: float) -> float:
        return round(pad + x * (width - 2 * pad), 1)

    middle = height / 2
    parts = [tag("line", class_="grid", x1=px(0), x2=px(1), y1=middle, y2=middle)]
    parts += [
        tag("line", class_="grid", x1=px(x), x2=px(x), y1=5, y2=height - 5) for x in (0, 0.5, 1)
    ]
    if low is not None and high is not None:
        whisker = {"class_": f"whisker series-{key}", "y1": middle, "y2": middle}
        parts.append(tag("line", x1=px(low), x2=px(high), **whisker))
    parts.append(tag("circle", class_=f"dot series-{key}", cx=px(value), cy=middle, r=3.5))
    box = f"0 0 {width} {height}"
    return tag(
        "svg", parts, class_="bar", viewBox=box, width=width, height=height, aria_hidden="true"
    )


def marker(shape: str, x: float, y: float, class_: str, r: float = 4) -> Html:
    """A point; shapes differ too, so that colour is never the only difference."""
    if shape == "square":
        side = 1.8 * r
        return tag("rect", class_=class_, x=x - side / 2, y=y - side / 2, width=side, height=side)
    if shape == "triangle":
        a, b = 1.25 * r, 0.75 * r
        return tag(
            "path", class_=class_, d=f"M{x} {y - a:.1f}L{x + a:.1f} {y + b:.1f}H{x - a:.1f}Z"
        )
    return tag("circle", class_=class_, cx=x, cy=y, r=r)


def swatch(key: str) -> Html:
    """The line and marker of a series, for a legend."""
    line = tag("line", class_=f"line series-{key}", x1=1, x2=29, y1=7, y2=7)
    dot = marker(MARKERS.get(key, "circle"), 15, 7, f"dot series-{key}")
    return tag("svg", line, dot, width=30, height=14, viewBox="0 0 30 14", aria_hidden="true")


def _line(chart: Chart, series: Series, px: Callable, py: Callable) -> list[Html]:
    points = series.points
    parts = []
    if (
        not chart.markers and len(points) >= 40
    ):  # noisy: the points faint, their running mean strong
        parts.append(tag("path", class_=f"line raw series-{series.key}", d=_path(points, px, py)))
        points = smooth(points)
    parts.append(tag("path", class_=f"line series-{series.key}", d=_path(points, px, py)))
    if chart.markers or len(points) == 1:
        shape = MARKERS.get(series.key, "circle")
        parts += [marker(shape, px(x), py(y), f"dot series-{series.key}") for x, y in points]
    return parts


def _path(points: Sequence[tuple[float, float]], px: Callable, py: Callable) -> str:
    return "M" + "L".join(f"{px(x)} {py(y)}" for x, y in thin(points))


def _band(series: Series, px: Callable, py: Callable) -> list[Html]:
    known = [(x, band) for (x, _), band in zip(series.points, _bands(series), strict=True) if band]
    if not known:
        return []
    if len(known) == 1:
        x, (low, high) = known[0]
        at = {"x1": px(x), "x2": px(x), "y1": py(low), "y2": py(high)}
        return [tag("line", class_=f"whisker series-{series.key}", **at)]
    upper = "L".join(f"{px(x)} {py(high)}" for x, (_, high) in known)
    lower = "L".join(f"{px(x)} {py(low)}" for x, (low, _) in reversed(known))
    return [tag("path", class_=f"band series-{series.key}", d=f"M{upper}L{lower}Z")]


def _bands(series: Series) -> list[tuple[float, float] | None]:
    return series.band or [None] * len(series.points)


def _padded(
    low: float, high: float, limits: tuple[float | None, float | None]
) -> tuple[float, float]:
    """low…high with a margin, which stops at the limits (a share never shows 105 %)."""
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 0.1
    padded_low, padded_high = low - pad, high + pad
    if limits[0] is not None:
        padded_low = max(padded_low, min(limits[0], low))
    if limits[1] is not None:
        padded_high = min(padded_high, max(limits[1], high))
    return padded_low, padded_high


def _within(
    y: float, drawn: tuple[float, float], limits: tuple[float | None, float | None]
) -> bool:
    """Whether a tick is in what is drawn, or may extend it because no limit lies there."""
    below = y < drawn[0] and limits[0] is not None
    above = y > drawn[1] and limits[1] is not None
    return not (below or above)
