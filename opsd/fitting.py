"""Rows that a run can train on: contexts and rollouts that fit the model's window, never cut."""

from collections.abc import Callable, Sequence

from opsd.config import Config
from opsd.data import Row
from opsd.errors import UserError
from opsd.needs import uses_teacher_prompt
from opsd.prompts import Prompts

NAMED_ROWS = 10  # that are too long, in the note that counts them


def trained_roles(config: Config, prompts: Prompts) -> list[str]:
    """The roles whose contexts run in training, and can be made of a row alone."""
    if config.method == "sft":
        return list(config.loss.roles)
    if uses_teacher_prompt(config) and not prompts.over_rollouts:
        return ["student", "teacher"]
    return ["student"]


def answer_tokens(row: Row, config: Config, prompts: Prompts) -> int:
    """The longest answer that may follow a row's contexts."""
    if config.method == "sft" or config.rollout.source == "reference":
        return len(prompts.target(row))
    return config.rollout.max_new_tokens


def fitting_rows(
    rows: Sequence[Row],
    prompts: Prompts,
    config: Config,
    limit: int | None,
    note: Callable[[str], None],
) -> list[Row]:
    """The rows whose longest context and answer are `limit` tokens at most (None: any).

    The others are an error, or left out, counted and named by `note`, as `prompts.too_long` says.
    Raises UserError too where fewer are left than a step needs.
    """
    kept, left = list(rows), []
    if limit is not None:
        kept, roles = [], trained_roles(config, prompts)
        for number, row in enumerate(rows, start=1):
            context = max(len(prompts.ids(row, role)) for role in roles)
            needed = context + answer_tokens(row, config, prompts)
            if needed <= limit:
                kept.append(row)
            else:
                left.append((number, needed))
    if left:
        number, needed = left[0]
        what = f"row {number} needs {needed} tokens with its answer, the model's window is {limit}"
        if config.prompts.too_long == "error":
            raise UserError(
                f"data.source: {what} ({len(left)} of {len(rows)} rows are too long); shorten "
                "rollout.max_new_tokens, or leave such rows out with prompts.too_long: skip"
            )
        named = ", ".join(str(number) for number, _ in left[:NAMED_ROWS])
        named += ", …" if len(left) > NAMED_ROWS else ""
        note(f"{len(left)} of {len(rows)} rows are left out ({named}): {what}")
    if len(kept) < config.train.problems_per_step:
        raise UserError(
            f"data.source has {len(kept)} training rows: train.problems_per_step "
            f"({config.train.problems_per_step}) may be at most that"
        )
    return kept


def different_endings(prompts: Prompts, config: Config) -> str | None:
    """What to know where the two roles begin their answers differently, as with enable_thinking for
    one of them; None where they begin alike."""
    if not uses_teacher_prompt(config) or config.method == "sft":
        return None
    student, teacher = prompts.ending("student"), prompts.ending("teacher")
    if student == teacher:
        return None
    return (
        f"The student's answer begins after {student!r}, the teacher's after {teacher!r}: the "
        "teacher judges a rollout's first token as its own beginning (prompts.teacher_prefill can "
        "open what it would open first)"
    )


def longest_sequence(rows: Sequence[Row], prompts: Prompts, config: Config) -> int:
    """Tokens of the longest context that is sampled from, and of the longest answer to it."""
    context = max((len(prompts.ids(row, "student")) for row in rows), default=0)
    return context + max(config.rollout.max_new_tokens, config.eval.max_new_tokens or 0)
