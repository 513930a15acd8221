"""Detects that a run learns nothing or diverges, and names the likely cause in one line.

A sign is read from each step's metrics and reported once it has been there for some steps in a row.
A resumed run first reads its earlier metrics and reports nothing twice.
"""

from collections.abc import Callable, Iterable
from typing import Any

Line = dict[str, Any]

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
            said = sign(line)
            self.counts[name] = self.counts[name] + 1 if said else 0
            if said and self.counts[name] >= self.patience and name not in self.said:
                self.said.add(name)
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


def _alike(line: Line) -> str | None:
    if line.get("informative_groups") != 0:
        return None
    share = line.get("correct_fraction")
    cause = "rollout.group_size or loss.reward leaves nothing to compare"
    if share == 0:
        cause = (
            "no rollout is right: look at rollouts.jsonl; the problems may be too hard, the "
            "answers cut (rollout.max_new_tokens), or in another form than loss.reward reads"
        )
    elif share == 1:
        cause = "every rollout is right: the problems are too easy"
    return f"all rewards of each group have been equal, so that nothing is learnt ({cause})"


def _flat(line: Line) -> str | None:
    if line.get("grad_norm") != 0 or line.get("informative_groups") == 0:
        return None
    return "the gradient has been 0 (every token may have weight 0: see loss.weights)"


def _same(line: Line) -> str | None:
    divergence = line.get("divergence")
    if divergence is None or abs(divergence) > 1e-9:
        return None
    return (
        "the divergence has been 0: teacher and student see the same context with the same weights "
        "(see prompts.teacher and teacher.policy)"
    )


def _still(line: Line) -> str | None:
    if not line.get("still") or not line.get("grad_norm"):
        return None
    return "no weight has moved (train.learning_rate or train.max_grad_norm is far too small)"


def _cut(line: Line) -> str | None:
    if line.get("truncated_fraction") != 1:
        return None
    return (
        "every rollout has been cut at rollout.max_new_tokens: raise it, or see whether the model "
        "writes the token that ends its turn"
    )


SIGNS: dict[str, Callable[[Line], str | None]] = {
    "equal_rewards": _alike,
    "zero_gradient": _flat,
    "zero_divergence": _same,
    "all_cut": _cut,
    "still_weights": _still,
}
"""The checks, by the names that metrics.jsonl has under `collapse`."""

RISING = {"rising_divergence": "divergence", "rising_entropy": "student_entropy"}
RISING["rising_loss"] = "loss"
"""Signs and the measure that each watches for a rise by RISE. The loss is watched for SFT only:
other methods' losses have no common scale."""
