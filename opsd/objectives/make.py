"""The objective that a config names."""

from transformers import PreTrainedModel

from opsd.config.config import Config
from opsd.config.requirements import scores_by_teacher
from opsd.data.prompts import Prompts
from opsd.objectives import GRPO, OPSD, SFT, Distill, Objective, TokenWeighting
from opsd.objectives.token_classes import class_table


def make_objective(config: Config, teacher: PreTrainedModel, prompts: Prompts) -> Objective:
    """The objective of `config.method`."""
    loss = config.loss
    classes = class_table(prompts.tokenizer)
    weighting = TokenWeighting(loss, config.rollout.max_new_tokens, classes)
    if config.method == "sft":
        return SFT(loss, prompts, weighting)
    if config.method == "grpo":
        return GRPO(loss, teacher if scores_by_teacher(config) else None, weighting)
    kind = OPSD if config.method == "opsd" else Distill
    return kind(loss, teacher, weighting, classes)
