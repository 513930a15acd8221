"""The methods, one file each: a step's rollouts → samples → loss and measures.

Import the methods and what they share from here, and `make_objective` from `make`.
"""

from opsd.objectives.base import Objective, Problem, Sample, Totals
from opsd.objectives.distill import Distill
from opsd.objectives.grpo import GRPO
from opsd.objectives.opsd import OPSD
from opsd.objectives.sft import SFT
from opsd.objectives.token_weights import TokenWeighting

__all__ = [
    "GRPO",
    "OPSD",
    "SFT",
    "Distill",
    "Objective",
    "Problem",
    "Sample",
    "TokenWeighting",
    "Totals",
]
