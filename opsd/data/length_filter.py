"""Rows that a run can train on: contexts and rollouts that fit the model's window, never cut."""

from collections.abc import Callable, Collection, Sequence

from opsd.common.errors import UserError
from opsd.config.config import Config
from opsd.config.requirements import uses_teacher_prompt
from opsd.data.prompts import Prompts
from opsd.data.rows import Row

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
    roles, needed = trained_roles(config, prompts), []
    if limit is not None:
        needed = [
            _longest(row, prompts, roles) + answer_tokens(row, config, prompts) for row in rows
        ]
    kept = _within(rows, needed, limit, prompts, "data.source", "row", note)
    if len(kept) < config.train.problems_per_step:
        raise UserError(
            f"data.source has {len(kept)} training rows: train.problems_per_step "
            f"({config.train.problems_per_step}) may be at most that"
        )
    return kept


def fitting_held_out(
    rows: Sequence[Row],
    prompts: Prompts,
    config: Config,
    limit: int | None,
    note: Callable[[str], None],
) -> list[Row]:
    """`fitting_rows` of the held-out problems: those whose answers are read beside the teacher's
    choices must fit after its context too. Raises UserError where none is left."""
    needed, read = [], 0
    answer, shown = longest_answer(config), shown_role(config, prompts)
    for row in rows if limit is not None else ():
        of_both = config.eval.teacher or read < config.eval.samples
        roles = {"student", shown} if of_both else {"student"}
        needed.append(_longest(row, prompts, roles) + answer)
        read += needed[-1] <= limit
    source = "data.source" if config.eval.source is None else "eval.source"
    kept = _within(rows, needed, limit, prompts, source, "held-out problem", note)
    if rows and not kept:
        raise UserError(f"{source} has no held-out problem that fits the model's window of {limit}")
    return kept


def longest_answer(config: Config) -> int:
    """To a held-out problem, in tokens."""
    return config.eval.max_new_tokens or config.rollout.max_new_tokens


def shown_role(config: Config, prompts: Prompts) -> str:
    """The context in which a teacher sees answers to held-out problems: there are no peers to show
    it, and another model sees what the student does."""
    return "student" if prompts.over_rollouts or config.method == "distill" else "teacher"


def _longest(row: Row, prompts: Prompts, roles: Collection[str]) -> int:
    return max(len(prompts.ids(row, role)) for role in roles)


def _within(
    rows: Sequence[Row],
    needed: Sequence[int],
    limit: int | None,
    prompts: Prompts,
    source: str,
    what: str,
    note: Callable[[str], None],
) -> list[Row]:
    """The rows that need `limit` tokens at most; the others are an error, or counted and named."""
    if limit is None:
        return list(rows)
    left = [(number, n) for number, n in enumerate(needed, start=1) if n > limit]
    if left:
        number, most = left[0]
        said = f"{what} {number} needs {most} tokens with its answer, the model's window is {limit}"
        if prompts.section.too_long == "error":
            shorter = "eval" if what.startswith("held-out") else "rollout"
            raise UserError(
                f"{source}: {said} ({len(left)} of {len(rows)} {what}s are too long); shorten "
                f"{shorter}.max_new_tokens, or leave such {what}s out with prompts.too_long: skip"
            )
        named = ", ".join(str(number) for number, _ in left[:NAMED_ROWS])
        named += ", …" if len(left) > NAMED_ROWS else ""
        note(f"{len(left)} of {len(rows)} {what}s are left out ({named}): {said}")
    return [row for row, n in zip(rows, needed, strict=True) if n <= limit]


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
    return context + max(config.rollout.max_new_tokens, longest_answer(config))
