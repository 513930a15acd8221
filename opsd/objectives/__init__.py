"""The methods, one file each: a step's problems → groups of samples → loss and measures.

Other rooms import the methods, what they share, and `make_objective` from here.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel

from opsd.config.loss import LossSection
from opsd.data.prompts import Prompts
from opsd.models.teacher import Member
from opsd.objectives.distill import Distill
from opsd.objectives.groups import Objective, Problem, Sample, SampleGroup, Totals, samples_of
from opsd.objectives.grpo import GRPO
from opsd.objectives.opsd import OPSD
from opsd.objectives.sft import SFT
from opsd.objectives.token_classes import class_table
from opsd.objectives.token_weights import TokenWeighting
from opsd.rollout import Sampling


def make_objective(
    method: str,
    loss: LossSection,
    teacher: PreTrainedModel,
    prompts: Prompts,
    sampling: Sampling,
    mix: Sequence[Member] = (),
) -> Objective:
    """Make the objective of this method. `sampling`: how its rollouts are sampled. `mix`: the
    members of teacher.mix."""
    classes = class_table(prompts.tokenizer)
    weighting = TokenWeighting(loss, sampling.max_new_tokens, classes)
    scorer = None if method == "sft" else teacher
    kind = {"opsd": OPSD, "distill": Distill, "grpo": GRPO, "sft": SFT}[method]
    return kind(loss, scorer, weighting, classes, sampling, prompts, mix)
