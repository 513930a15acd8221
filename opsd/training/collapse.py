"""Detects that a run collapses; `train.collapse` says what happens then.

Four measures are averaged over a window of steps: the student's entropy and the rollouts' length,
compared with the first window; pass@k of graded rollouts, compared with the best window; and the
share of tokens whose clipped gradient points away from the unclipped one, compared with a bound.
On-policy self-distillation is known to collapse after some hundred steps at high learning rates.
Where rollouts are graded, pass@k shows it first, some steps after the accuracy has fallen
(docs/results.md). While it is above its first window's, less entropy and shorter rollouts are no
collapse: a student that learns becomes sure.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from opsd.config.sections import CollapseSection


@dataclass
class Trace:
    """The last values of one measure, and the means to compare them with."""

    window: int
    values: list[float] = field(default_factory=list)
    last: float = 0.0  # mean of the last window
    first: float | None = None  # mean of the first window
    best: float | None = None  # highest mean of a window

    def add(self, value: float) -> float | None:
        """Add a value. Returns the mean of the last window, or None while it is not full."""
        self.values = [*self.values, value][-self.window :]
        if len(self.values) < self.window:
            return None
        self.last = mean = sum(self.values) / self.window
        self.first = mean if self.first is None else self.first
        self.best = mean if self.best is None else max(self.best, mean)
        return mean


class CollapseWatch:
    """Reads each step's metrics and reports each measure that collapses, once.

    `past`: the metrics of earlier steps, if a run is resumed.
    """

    def __init__(self, section: CollapseSection, past: Iterable[dict] = ()):
        self.section, self.seen = section, set[str]()
        self.traces: dict[str, Trace] = {}
        for line in past:
            self(line)

    def __call__(self, line: dict) -> dict[str, str]:
        """Read a step's metrics. Returns a sentence for each measure that collapses now."""
        if self.section.on == "off":
            return {}
        found = {}
        for name, measure in _MEASURES.items():
            value = line.get(measure)
            if value is None:
                continue
            trace = self.traces.setdefault(name, Trace(self.section.window))
            mean = trace.add(value)
            bound = getattr(self.section, name)
            said = None if mean is None else _judge(name, measure, mean, bound, trace)
            seen = self.traces.get("pass_at_k")
            learns = seen is not None and seen.first is not None and seen.last > seen.first
            if name in ("entropy", "length") and learns:
                continue
            if said is not None and name not in self.seen:
                self.seen.add(name)
                found[name] = f"{said} (train.collapse.{name} is {bound:g})"
        return found


_MEASURES = {
    "pass_at_k": "pass_at_k",  # the first, because the others look at it
    "entropy": "student_entropy",
    "length": "rollout_length",
    "inverted_gradient": "inverted_gradient_fraction",
}


def _judge(name: str, measure: str, mean: float, bound: float, trace: Trace) -> str | None:
    """A sentence if the window's mean is beyond its bound, else None."""
    if name == "inverted_gradient":
        wrong = mean > bound
        return f"{measure} is {mean:.3g} over {trace.window} steps" if wrong else None
    before, when = (trace.best, "at its best") if name == "pass_at_k" else (trace.first, "at first")
    if before <= 0 or mean >= bound * before:
        return None
    return f"{measure} is {mean:.3g} over {trace.window} steps, it was {before:.3g} {when}"
