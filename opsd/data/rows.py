"""Problems with their solutions and answers, from wherever they are kept.

A source is one of
- a .jsonl, .json or .parquet file,
- a directory saved by `datasets` (with or without splits),
- `reasoning_gym:<task>`, problems drawn without end by that library,
- the name of a dataset on the Hugging Face hub, `owner/name`.

What is wrong with a source is a UserError that names the field (`data.columns`, say), what it was
and what it may be. Heavy libraries are imported by the functions that need them.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from opsd.common.errors import UserError
from opsd.data.references import Unreadable, final_answer
from opsd.data.sources import DEFAULT_DRAW, REASONING_GYM, _check_names, _draw, _kind, _stored

COLUMNS = ("problem", "solution", "answer")


@dataclass(frozen=True)
class Row:
    """One problem. `columns` is the row as its source has it, for templates.

    `answer` is the bare final answer (`opsd.data.references`): what follows `####` in an answer
    written as GSM8K's, or what the last `\\boxed{}` holds, where the source's answer has either. A
    column that the caller does not require and the source does not have is "".
    """

    problem: str
    solution: str
    answer: str
    columns: dict[str, Any]


def load_rows(
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    size: int | None = None,
    options: Mapping[str, Any] | None = None,
    require: Sequence[str] = COLUMNS,
    section: str = "data",
    graded: bool = True,
) -> list[Row]:
    """The rows of a source, in its order.

    source: a .jsonl, .json or .parquet file, a directory saved by `datasets`, a hub name, or
        reasoning_gym:<task>.
    columns: our name → theirs, for any of problem, solution, answer; `metadata.answer_cot` reaches
        into nested columns. What it leaves out has its own name, but in reasoning_gym `question`,
        `answer` and `metadata.answer_cot`.
    split: of sources that have splits; files and reasoning_gym have none.
    limit: at most so many rows.
    seed, size: for reasoning_gym, which draws `size` problems (default 1000, or `limit`) from
        `seed`. Different seeds give different draws, which may still share problems: see
        split_rows.
    options: for reasoning_gym the task's own options; for the hub `name` (configuration) and
        `revision`.
    require: the columns that each row must have, with some text in it. An integer answer will do.
    section: the section of the configuration that error messages name.
    graded: required answers are compared with a model's, so each must name a final answer.

    Raises UserError for a source that is not there, rows without a required column, no rows.

    >>> _ = Path("rows.jsonl").write_text('{"question": "2 + 2?", "answer": "4"}')
    >>> load_rows("rows.jsonl", columns={"problem": "question"}, require=["problem"])[0].answer
    '4'
    """
    columns, options = dict(columns or {}), dict(options or {})
    _check_names(f"{section}.columns", columns, COLUMNS)
    for field, value in (("limit", limit), ("size", size)):
        if value is not None and value < 1:
            raise UserError(f"{section}.{field}: {value!r} is not a positive number")
    if source.startswith(REASONING_GYM):
        theirs = {"problem": "question", "answer": "answer", "solution": "metadata.answer_cot"}
        raw = _draw(source, size or limit or DEFAULT_DRAW, seed, options, section)
    else:
        theirs = {name: name for name in COLUMNS}
        if size is not None:
            raise UserError(
                f"{section}.size: only reasoning_gym draws a number of problems; for {source!r} "
                "use `limit`"
            )
        raw = _stored(source, split, options, section)
    theirs |= columns
    must = {*require, *columns}
    # reasoning_gym's answers are whatever its task says they are.
    graded = graded and "answer" in must and not source.startswith(REASONING_GYM)
    rows = [
        _row(record, number, theirs, must, source, section, graded)
        for number, record in enumerate(islice(raw, limit), start=1)
    ]
    if not rows:
        raise UserError(f"{section}.source: {source!r} has no rows")
    return rows


def split_rows(rows: Sequence[Row], heldout: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, heldout): `heldout` distinct problems drawn by `seed`, and every row of the others.

    No problem's text is in both, however often it occurs; white space and case make no difference.
    Raises UserError if that would leave nothing to train on.
    """
    first: dict[str, int] = {}
    for index, row in enumerate(rows):
        first.setdefault(_same(row.problem), index)
    if not 0 <= heldout < len(first):
        raise UserError(
            f"eval.problems: {heldout} held-out problems cannot be taken from data with "
            f"{len(first)} distinct problems (0 to {len(first) - 1} can)"
        )
    chosen = set(random.Random(seed).sample(list(first), heldout))
    kept = [row for row in rows if _same(row.problem) not in chosen]
    return kept, [rows[index] for problem, index in first.items() if problem in chosen]


def _same(problem: str) -> str:
    return " ".join(problem.split()).casefold()


# --- from a record to a row ---------------------------------------------------------------------


def _row(
    record: Any,
    number: int,
    theirs: Mapping[str, str],
    must: set[str],
    source: str,
    section: str,
    graded: bool,
) -> Row:
    where = f"{section}.source: row {number} of {source!r}"
    if not isinstance(record, dict):
        raise UserError(f"{where} is {_kind(record)}, not an object with columns")
    values = {}
    for name in COLUMNS:
        column = theirs[name]
        found, value = _reach(record, column)
        if isinstance(value, int) and not isinstance(value, bool) and name == "answer":
            value = str(value)
        text = isinstance(value, str) and value.strip() != ""
        if name in must and not text:
            if not found:
                raise UserError(_missing_column(name, column, record, number, source, section))
            problem = "empty" if value is None or isinstance(value, str) else _kind(value)
            raise UserError(f"{where} has no text in column {column!r} ({name}): it is {problem}")
        if text and not value.isascii() and _has_half_pair(value):
            raise UserError(
                f"{where}: column {column!r} ({name}) holds half of a surrogate pair, which is no "
                "character and cannot be tokenised"
            )
        values[name] = value if text else ""
    if values["answer"]:
        try:
            values["answer"] = final_answer(values["answer"])
        except Unreadable as problem:
            if graded:
                raise UserError(
                    f"{where}: column {theirs['answer']!r} (answer) {problem}"
                ) from None
    return Row(**values, columns=record)


def _has_half_pair(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _reach(record: Any, column: str) -> tuple[bool, Any]:
    """(whether it is there, the value) of a column whose name may reach inside with dots."""
    if isinstance(record, dict) and column in record:
        return True, record[column]
    head, dot, rest = column.partition(".")
    if not dot:
        return False, None
    if isinstance(record, dict) and head in record:
        return _reach(record[head], rest)
    return False, None


def _paths(record: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in record.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")


def _missing_column(
    name: str, column: str, record: dict, number: int, source: str, section: str
) -> str:
    present = list(_paths(record))
    near = difflib.get_close_matches(column, present, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    named = "" if number == 1 else f"row {number} of "
    return (
        f"{section}.columns.{name}: {named}{source!r} has no column {column!r}{hint}; "
        f"it has {', '.join(map(repr, present)) or 'none'}"
    )


# --- stored data --------------------------------------------------------------------------------


# --- reasoning_gym ------------------------------------------------------------------------------
