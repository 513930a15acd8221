"""What follows from a config: which roles, columns, grades and lengths it needs. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opsd.common.templates import names, over_rollouts
from opsd.config.names import DIVERGENCE_METHODS

if TYPE_CHECKING:
    from opsd.config.config import Config


def uses_teacher_prompt(config: Config) -> bool:
    """Whether prompts.teacher is filled in for training."""
    if config.method == "sft":
        return "teacher" in config.loss.roles
    if config.method == "grpo":
        return config.loss.credit > 0 or config.loss.distil > 0
    return config.method == "opsd" and "teacher" in teacher_roles(config)


def teacher_roles(config: Config) -> list[str]:
    """The contexts in which the members of a teacher see rollouts."""
    if config.method == "distill":
        return ["student"]
    return [member.context for member in config.teacher.mix] or ["teacher"]


def teaching_templates(config: Config) -> dict[str, str]:
    """The templates that training fills in for teachers, beside the student's: by role."""
    others = config.prompts.contexts if config.method == "opsd" else {}
    own = {"teacher": config.prompts.teacher} if uses_teacher_prompt(config) else {}
    return own | others


def teaches_over_rollouts(config: Config) -> bool:
    """Whether a teacher's context is made of rollouts, its own or its peers'."""
    return any(map(over_rollouts, teaching_templates(config).values()))


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
        return max(config.loss.credit, config.loss.distil, config.loss.kl) > 0
    return config.method in DIVERGENCE_METHODS


def learns_targets(config: Config) -> bool:
    """Whether the text that is learnt is each row's prompts.target, not a rollout."""
    return config.method == "sft" or config.rollout.source == "reference"


def trained_roles(config: Config) -> list[str]:
    """The roles whose contexts are trained on and can be made of a row alone."""
    if config.method == "sft":
        return list(config.loss.roles)
    taught = teaching_templates(config).items()
    return ["student", *(role for role, template in taught if not over_rollouts(template))]


def longest_rollout(config: Config) -> int | None:
    """Tokens of the longest text that is learnt after a context; None: it is the row's target."""
    return None if learns_targets(config) else config.rollout.max_new_tokens


def longest_answer(config: Config) -> int:
    """Tokens of the longest answer to a held-out problem."""
    return config.eval.max_new_tokens or config.rollout.max_new_tokens


def held_out_teacher_role(config: Config) -> str:
    """The context in which a teacher sees answers to held-out problems. There are no rollouts to
    make it of, and under distill the teacher sees what the student does."""
    role = teacher_roles(config)[0]
    template = config.prompts.contexts.get(role, config.prompts.teacher)
    alike = role == "student" or over_rollouts(template)
    return "student" if alike else role


def required_columns(config: Config) -> list[str]:
    """Of problem, solution and answer, those that every training row must have."""
    used = set(names(config.prompts.student))
    for template in teaching_templates(config).values():
        used |= names(template)
    if config.eval.teacher:
        used |= names(config.prompts.teacher)
    if learns_targets(config):
        used |= names(config.prompts.target)
    if compares_answers(config):
        used.add("answer")
    return ["problem", *(name for name in ("solution", "answer") if name in used)]
