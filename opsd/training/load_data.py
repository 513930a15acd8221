"""A run's training rows and held-out rows, with no problem in both."""

from opsd.config.config import Config
from opsd.config.requirements import compares_answers, required_columns
from opsd.data.rows import Row, load_rows, split_rows


def load_data(config: Config) -> tuple[list[Row], list[Row]]:
    """The training rows and the held-out ones, with no problem in both."""
    data, held = config.data, config.eval
    rows = load_rows(
        data.source,
        columns=data.columns,
        split=data.split,
        limit=data.limit,
        size=data.size,
        seed=config.train.seed,
        options=data.options,
        require=required_columns(config),
        graded=compares_answers(config),
    )
    if held.problems == 0:
        return rows, []
    if held.source is None:
        return split_rows(rows, held.problems, config.train.seed)
    held_out = load_rows(
        held.source,
        columns=data.columns if held.columns is None else held.columns,
        split=held.split,
        limit=held.problems,
        seed=config.train.seed + 1,
        options=data.options if held.options is None else held.options,
        require=("problem", "answer"),
        section="eval",
    )
    known = {row.problem for row in held_out}
    return [row for row in rows if row.problem not in known], held_out
