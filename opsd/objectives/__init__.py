"""The methods, one file each: a step's problems → groups of samples → loss and measures.

Other rooms import the methods, what they share, and `make_objective` from here.
"""

from transformers import PreTrainedModel

from opsd.config.loss import LossSection
from opsd.data.prompts import Prompts
from opsd.objectives.distill import Distill
from opsd.objectives.groups import Objective, Problem, Sample, SampleGroup, Totals, samples_of
from opsd.objectives.grpo import GRPO
from opsd.objectives.opsd import OPSD
from opsd.objectives.sft import SFT
from opsd.objectives.token_classes import class_table
from opsd.objectives.token_weights import TokenWeighting
from opsd.rollout import Sampling

__all__ = [
    "GRPO", "OPSD", "SFT", "Distill", "Objective", "Problem", "Sample", "SampleGroup",
    "TokenWeighting", "Totals", "make_objective", "samples_of",
]  # fmt: skip


def make_objective(
    method: str,
    loss: LossSection,
    teacher: PreTrainedModel,
    prompts: Prompts,
    sampling: Sampling,
) -> Objective:
    """The objective of a method's name. `sampling`: how its rollouts are drawn."""
    classes = class_table(prompts.tokenizer)
    weighting = TokenWeighting(loss, sampling.max_new_tokens, classes)
    if method == "sft":
        return SFT(loss, prompts, weighting)
    if method == "grpo":
        return GRPO(loss, teacher, weighting, sampling)
    kind = OPSD if method == "opsd" else Distill
    return kind(loss, teacher, weighting, classes, sampling)
