"""A run's training rows and held-out rows: no problem in both, and all fit the model's window."""

from collections.abc import Sequence

from opsd.common.display import Display
from opsd.common.errors import UserError
from opsd.config.config import Config
from opsd.config.requirements import (
    held_out_teacher_role,
    longest_answer,
    longest_rollout,
    required_columns,
    trained_roles,
    uses_teacher_prompt,
)
from opsd.data.length_filter import fitting_held_out, fitting_rows
from opsd.data.prompts import Prompts
from opsd.data.rows import Row, load_rows, split_rows


def load_data(config: Config) -> tuple[list[Row], list[Row]]:
    """The training rows and the held-out ones, with no problem in both."""
    data, test = config.data, config.eval
    rows = load_rows(
        data.source,
        columns=data.columns,
        split=data.split,
        limit=data.limit,
        size=data.size,
        seed=config.train.seed,
        options=data.options,
        require=required_columns(config),
    )
    if test.problems == 0:
        return rows, []
    if test.source is None:
        return split_rows(rows, test.problems, config.train.seed)
    held_out = load_rows(
        test.source,
        columns=data.columns if test.columns is None else test.columns,
        split=test.split,
        limit=test.problems,
        seed=config.train.seed + 1,
        options=data.options if test.options is None else test.options,
        require=("problem", "answer"),
        section="eval",
    )
    known = {row.problem for row in held_out}
    return [row for row in rows if row.problem not in known], held_out


def fitting_data(
    config: Config,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    prompts: Prompts,
    window: int | None,
    display: Display,
) -> tuple[list[Row], list[Row]]:
    """The training rows and held-out ones that fit the window; tells what the user should know.

    Raises UserError for rows that do not fit, unless `prompts.too_long` has them left out, and
    where fewer are left than a step needs.
    """
    with display.stage("Check the rows' lengths", total=len(rows)) as stage:
        rows = fitting_rows(
            rows,
            prompts,
            trained_roles(config),
            longest_rollout(config),
            window,
            display.note,
            stage.advance,
        )
        if len(rows) < config.train.problems_per_step:
            raise UserError(
                f"data.source has {len(rows)} training rows: train.problems_per_step "
                f"({config.train.problems_per_step}) may be at most that"
            )
        held_out = fitting_held_out(
            held_out,
            prompts,
            held_out_teacher_role(config),
            None if config.eval.teacher else config.eval.samples,
            longest_answer(config),
            window,
            "data.source" if config.eval.source is None else "eval.source",
            display.note,
        )
    both = uses_teacher_prompt(config) and config.method != "sft"
    if both and (differ := prompts.different_endings()) is not None:
        display.note(differ)
    return rows, held_out
