"""Whether the engine that samples has the weights that train: by its log-probabilities."""

from collections.abc import Callable
from dataclasses import dataclass

from opsd.config.compatibility import refused
from opsd.config.config import Config
from opsd.objectives import Totals

MAY_DIFFER, ENGINES_DIFFER = 0.02, 0.2
"""Nats a token, in the mean over a step: more than rounding of an engine's usually makes; what none
explains."""


@dataclass
class EngineCheck:
    """Called with the totals of each step's first update."""

    config: Config
    note: Callable[[str], None]
    noted: float = MAY_DIFFER  # a larger difference is noted

    def __call__(self, totals: Totals, step: int) -> None:
        """Raises UserError if the rollouts show that the engine has other weights; notes it where
        it may have, and again when the difference has doubled."""
        difference = abs(totals.means().get("engine_divergence", 0.0))
        said = "rollout.engine: its log-probabilities differ from the student's by "
        said += f"{difference:.3g} a token"
        if difference > ENGINES_DIFFER and not (self.config.rollout.ahead and step > 1):
            raise refused(
                self.config,
                f"{said} in the mean (at most {ENGINES_DIFFER} is rounding): it "
                "serves other weights than those it was given",
            )
        if difference > self.noted:
            moved = " than it was given, or a step moves the student so far (rollout.ahead)"
            older = f"it may serve older weights{moved if self.config.rollout.ahead else ''}"
            self.note(f"step {step}: {said}: {older}")
            self.noted = 2 * difference
