"""Checks by log-probabilities that the sampling engine has the trained model's weights."""

from collections.abc import Callable
from dataclasses import dataclass

from opsd.config.compatibility import refused
from opsd.config.config import Config
from opsd.objectives import Totals

MAY_DIFFER, ENGINES_DIFFER = 0.02, 0.2
"""Mean nats a token over a step: the first is unusual for rounding, the second is not rounding."""


@dataclass
class EngineCheck:
    """Compares the engine with the student, by the totals of each step's first update."""

    config: Config
    note: Callable[[str], None]
    noted: float = MAY_DIFFER  # show a note for a larger difference
    last: float = 0.0  # the difference in the step before

    def __call__(self, totals: Totals, step: int) -> None:
        """Raise UserError if the engine has other weights than the student. If it only may have,
        show a note, and again when the difference has doubled."""
        difference = abs(totals.means().get("engine_divergence", 0.0))
        said = "rollout.engine: its log-probabilities differ from the student's by "
        said += f"{difference:.3g} a token"
        # A step ahead its weights are an update older, which one step may explain.
        ahead = bool(self.config.rollout.ahead) and step > 1
        if difference > ENGINES_DIFFER and (not ahead or self.last > ENGINES_DIFFER):
            far = ", or every step moves the student so far (lower train.learning_rate)"
            raise refused(
                self.config,
                f"{said} in the mean (at most {ENGINES_DIFFER} is rounding): it "
                f"serves other weights than those it was given{far if ahead else ''}",
            )
        self.last = difference
        if difference > self.noted:
            moved = " than it was given, or a step moves the student so far (rollout.ahead)"
            older = f"it may serve older weights{moved if self.config.rollout.ahead else ''}"
            self.note(f"step {step}: {said}: {older}")
            self.noted = 2 * difference
