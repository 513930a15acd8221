"""The methods: one file each, all with the same two functions' worth of work (see `base`)."""

from opsd.objectives.base import Batch, Objective, Sample
from opsd.objectives.grpo import GRPO
from opsd.objectives.opsd import OPSD
from opsd.objectives.sft import SFT

OBJECTIVES = {"opsd": OPSD, "grpo": GRPO, "sft": SFT}

__all__ = ["GRPO", "OBJECTIVES", "OPSD", "SFT", "Batch", "Objective", "Sample"]
