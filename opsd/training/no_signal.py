"""Detects that a run learns nothing or diverges, and names the likely cause in one line.

A sign is read from each step's metrics and reported once it has been there for some steps in a row.
A resumed run first reads its earlier metrics and reports nothing twice.
"""

from collections.abc import Callable, Iterable
from typing import Any

from opsd.common.files import read_toml

Line = dict[str, Any]
SAID = read_toml(__file__, "no_signal")
CAUSES = {0: "none_right", 1: "all_right"}  # by the share of right rollouts

RISE, FIRST = 5.0, 3
"""Nats a token above the lowest of the FIRST steps. No run that learns rises so far; with too high
a learning rate one does within a few steps."""


class NoSignalWatch:
    """Reads each step's metrics, after those of the `past`, and reports each sign once."""

    def __init__(self, patience: int, past: Iterable[Line] = ()):
        self.patience = patience  # steps in a row before a sign is reported; 0: report nothing
        self.counts = dict.fromkeys(SIGNS, 0)
        self.first: dict[str, list[float]] = {}
        self.said: set[str] = set()
        for line in past:
            self(line)

    def __call__(self, line: Line) -> dict[str, str]:
        """Read a step's metrics. Returns a sentence for each sign that is reported now."""
        if not self.patience:
            return {}
        found = {}
        for name, sign in SIGNS.items():
            self.counts[name] = self.counts[name] + 1 if sign(line) else 0
            if self.counts[name] >= self.patience and name not in self.said:
                self.said.add(name)
                cause = CAUSES.get(line.get("correct_fraction"), "other")
                said = SAID[name].format(cause=SAID["cause"][cause])
                found[name] = f"for {self.counts[name]} steps {said}"
        for name, measure in RISING.items():
            if (said := self._risen(line, measure)) and name not in self.said:
                self.said.add(name)
                found[name] = said
        return found

    def _risen(self, line: Line, measure: str) -> str | None:
        value = line.get(measure)
        if value is None or (measure == "loss" and line.get("method") != "sft"):
            return None
        first = self.first.setdefault(measure, [])
        if len(first) < FIRST:
            first.append(value)
        start = min(first)
        if value - start <= RISE:
            return None
        return (
            f"{measure} is {value:.3g} nats a token, it was {start:.3g}: train.learning_rate is "
            "probably too high"
        )


SIGNS: dict[str, Callable[[Line], Any]] = {
    "equal_rewards": lambda line: line.get("informative_groups") == 0,
    "zero_gradient": lambda line: line.get("grad_norm") == 0 != line.get("informative_groups"),
    "zero_divergence": lambda line: (
        abs(1.0 if line.get("divergence") is None else line["divergence"]) <= 1e-9
    ),
    "all_cut": lambda line: line.get("truncated_fraction") == 1,
    "still_weights": lambda line: line.get("still") and line.get("grad_norm"),
}
"""The checks, by the names that metrics.jsonl has under `collapse`."""

RISING = {"rising_divergence": "divergence", "rising_entropy": "student_entropy"}
RISING["rising_loss"] = "loss"
"""Signs and the measure that each watches for a rise by RISE. The loss is watched for SFT only:
other methods' losses have no common scale."""
