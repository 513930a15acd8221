"""What a config asks of its data, and of whom. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opsd.common.templates import names, over_rollouts

if TYPE_CHECKING:
    from opsd.config.config import Config


def uses_teacher_prompt(config: Config) -> bool:
    """Whether prompts.teacher is filled in for training."""
    if config.method == "sft":
        return "teacher" in config.loss.roles
    if config.method == "grpo":
        return config.loss.credit > 0
    return config.method == "opsd"


def teaches_over_rollouts(config: Config) -> bool:
    """Whether the teacher's context is made of rollouts, its own or its peers'."""
    return uses_teacher_prompt(config) and over_rollouts(config.prompts.teacher)


def needs_grades(config: Config) -> bool:
    """Whether the method cannot do without knowing which rollouts are right."""
    if config.method == "sft":
        return False
    weights = config.loss.weights
    unequal = (weights.correct, weights.incorrect) != (1.0, 1.0)
    return config.method == "grpo" or unequal or teaches_over_rollouts(config)


def is_graded(config: Config) -> bool:
    """Whether rollouts are graded."""
    return needs_grades(config) or config.loss.reward.log


def compares_answers(config: Config) -> bool:
    """Whether the training data's answers are compared with the model's."""
    answers = is_graded(config) and config.loss.reward.verifier == "math"
    own_test = config.eval.problems > 0 and config.eval.source is None
    return answers or own_test


def scores_by_teacher(config: Config) -> bool:
    """Whether training runs a teacher, or a reference."""
    if config.method == "grpo":
        return config.loss.credit > 0 or config.loss.kl > 0
    return config.method in ("opsd", "distill")


def required_columns(config: Config) -> list[str]:
    """Of problem, solution and answer, those that every training row must have."""
    used = names(config.prompts.student)
    if uses_teacher_prompt(config) or config.eval.teacher:
        used |= names(config.prompts.teacher)
    if config.method == "sft" or config.rollout.source == "reference":
        used |= names(config.prompts.target)
    if compares_answers(config):
        used.add("answer")
    return ["problem", *(name for name in ("solution", "answer") if name in used)]
