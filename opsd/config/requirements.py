"""Derive from a config which roles, columns, grades and lengths a run needs. Needs no torch."""

from __future__ import annotations

from fnmatch import fnmatch
from functools import reduce
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from opsd.common.errors import UserError
from opsd.common.files import read_toml
from opsd.common.templates import SOLUTION_NAMES, names, over_rollouts
from opsd.config.names import DIVERGENCE_METHODS

if TYPE_CHECKING:
    from opsd.config.config import Config

PACKAGES: dict[str, dict[str, str]] = read_toml(__file__, "packages")


def uses_teacher_prompt(config: Config) -> bool:
    """Whether training renders prompts.teacher."""
    if config.method == "sft":
        return "teacher" in config.loss.roles
    if config.method == "grpo" and not (config.loss.credit or config.loss.distil):
        return False
    return "teacher" in teacher_roles(config)


def teacher_roles(config: Config) -> list[str]:
    """The role of the context in which each member of the teacher scores rollouts."""
    own = "student" if config.method == "distill" else "teacher"
    return [member.context or own for member in config.teacher.mix] or [own]


def teaching_templates(config: Config) -> dict[str, str]:
    """Role → template, for each context that training renders for a teacher."""
    others = config.prompts.contexts if config.teacher.mix else {}
    own = {"teacher": config.prompts.teacher} if uses_teacher_prompt(config) else {}
    return own | others


def teaches_over_rollouts(config: Config) -> bool:
    """Whether a teacher's context contains rollouts: the one to be scored or its peers."""
    return any(map(over_rollouts, teaching_templates(config).values()))


def votes(config: Config) -> bool:
    """Whether the rollouts' majority answer replaces a missing solution."""
    return config.prompts.majority is not None


def unvaried(config: Config) -> str | None:
    """Why problems with other numbers (data.varied) cannot hold the student; None if they can."""
    if config.method != "opsd":
        return "that is for opsd"
    if not any(names(text) & SOLUTION_NAMES for text in teaching_templates(config).values()):
        return "no teacher is shown `solution` or `answer`"
    if {member.policy for member in config.teacher.members()} == {"live"}:
        return "a live teacher is the student itself, and holds it nowhere"
    if votes(config) or needs_grades(config) or uses_targets(config):
        return "a problem with other numbers has no answer to grade, to vote on or to learn"
    return None


def waits_for_rollouts(config: Config, template: str) -> bool:
    """Whether a teacher's template is rendered after sampling."""
    return over_rollouts(template) or (votes(config) and bool(names(template) & SOLUTION_NAMES))


def needs_grades(config: Config) -> bool:
    """Whether the method needs to know which rollouts are right."""
    if config.method == "sft":
        return False
    weights = config.loss.weights
    unequal = (weights.correct, weights.incorrect) != (1.0, 1.0)
    return config.method == "grpo" or unequal or teaches_over_rollouts(config)


def is_graded(config: Config) -> bool:
    """Whether rollouts are graded, for the method or only for the log."""
    return needs_grades(config) or config.loss.reward.log


def compares_answers(config: Config) -> bool:
    """Whether the data's answers are needed: for the verifier "math", or for held-out problems."""
    answers = is_graded(config) and config.loss.reward.verifier == "math"
    own_test = config.eval.problems > 0 and config.eval.source is None
    return answers or own_test


def scores_by_teacher(config: Config) -> bool:
    """Whether training runs a teacher, or grpo's reference."""
    if config.method == "grpo":
        return max(config.loss.credit, config.loss.distil, config.loss.kl) > 0
    return config.method in DIVERGENCE_METHODS


def learns_targets(config: Config) -> bool:
    """Whether training uses each row's prompts.target instead of rollouts."""
    return config.method == "sft" or config.rollout.source == "reference"


def uses_targets(config: Config) -> bool:
    """Whether training uses each row's prompts.target, alone or in addition to rollouts."""
    return learns_targets(config) or config.loss.sft_alpha > 0


def trained_roles(config: Config) -> list[str]:
    """The roles whose contexts training uses and that a row alone determines."""
    if config.method == "sft":
        return list(config.loss.roles)
    taught = teaching_templates(config).items()
    return ["student", *(role for role, text in taught if not waits_for_rollouts(config, text))]


def own_templates(config: Config) -> dict[str, str]:
    """Name → template, for those of student, teacher and target that a row alone fills in."""
    used = [*trained_roles(config), *["target"] * uses_targets(config)]
    named = (name for name in ("student", "teacher", "target") if name in used)
    return {name: getattr(config.prompts, name) for name in named}


def longest_rollout(config: Config) -> int | None:
    """The longest rollout, in tokens; None if the rows' targets are trained on instead."""
    return None if learns_targets(config) else config.rollout.max_new_tokens


def longest_answer(config: Config) -> int:
    """The longest answer to a held-out problem, in tokens."""
    return config.eval.max_new_tokens or config.rollout.max_new_tokens


def held_out_teacher_role(config: Config) -> str:
    """The role of the context in which the teacher scores answers to held-out problems. It is the
    student's if the teacher's template needs rollouts, and under distill."""
    role = teacher_roles(config)[0]
    template = config.prompts.contexts.get(role, config.prompts.teacher)
    alike = role == "student" or waits_for_rollouts(config, template)
    return "student" if alike else role


def shows_images(config: Config) -> bool:
    """Whether a column of images is named for any of the rows."""
    sources = config.data.source if isinstance(config.data.source, list) else []
    given = [config.data.columns, config.eval.columns or {}]
    given += [source.columns for source in sources]
    return any("images" in columns for columns in given)


def required_columns(config: Config) -> list[str]:
    """Which of problem, solution and answer every training row must have."""
    used = set(names(config.prompts.student))
    for template in teaching_templates(config).values():
        optional = votes(config) or config.prompts.hold
        used |= names(template) - (SOLUTION_NAMES if optional else set())
    if config.eval.teacher:
        used |= names(config.prompts.teacher)
    if uses_targets(config):
        used |= names(config.prompts.target)
    if compares_answers(config):
        used.add("answer")
    return ["problem", *(name for name in ("solution", "answer") if name in used)]


def check_packages(config: Config, where: str) -> None:
    """Raises UserError for a value that needs a package which is not installed. where: `anywhere`
    or `gpu`, see packages.toml."""
    for setting, text in PACKAGES[where].items():
        field, _, form = setting.partition("=")
        value: Any = reduce(lambda one, name: getattr(one, name, None), field.split("."), config)
        packages, *instead = text.partition(";")
        names = packages.split()
        for one in value if isinstance(value, list) else [value]:
            if fnmatch(str(one), form) and not any(map(find_spec, names)):
                raise UserError(
                    f"{field} is {one!r}: it needs pip install {names[0]}{''.join(instead)}"
                )
