"""Find the rows that, with their answers, fit the model's window. Rows are never truncated: those
that do not fit are left out or refused.

A row is tokenised only if a bound by its size leaves in doubt whether it fits."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from sys import maxsize

from opsd.common.errors import UserError
from opsd.data.prompts import BATCH, Prompts, UnreadableRowError
from opsd.data.rows import Row

NAMED_ROWS = 10  # at most this many rows that are too long are named in a note


def fitting_rows(
    rows: Sequence[Row],
    prompts: Prompts,
    roles: Collection[str],  # those whose contexts training uses and a row alone determines
    answer: int | None,  # tokens of the longest answer; None: a row's target is its answer
    window: int | None,
    note: Callable[[str], None],
    # Called with the number of rows checked since the last call
    advance: Callable[[int], None] = lambda rows: None,
    # Called with each row's number, from 1, and the row
    check: Callable[[int, Row], None] = lambda number, row: None,
) -> list[Row]:
    """The training rows whose longest context and answer have at most `window` tokens (None: all).

    By `prompts.too_long`, other rows raise UserError, or are left out, counted and named by `note`.
    """
    needed, where = [], "data.source: row"
    with _numbered(rows, where):
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            for role in roles:
                prompts.rendered(batch, role)  # all at once; the next lines use them
            for number, row in enumerate(batch, start=start + 1):
                check(number, row)
            doubtful = []
            if window is not None or prompts.may_be_unreadable:
                doubtful = _doubtful(batch, prompts, roles, answer, window or maxsize)
            counted = iter(tokens_needed(doubtful, prompts, roles, answer))
            names = set(map(id, doubtful))
            needed += [next(counted) if id(row) in names else 0 for row in batch]
            advance(len(batch))
    if window is None:
        return list(rows)
    return _within(rows, needed, answer, window, prompts, where, note)


def fitting_held_out(
    rows: Sequence[Row],
    prompts: Prompts,
    teacher_role: str,
    in_both: int | None,
    answer: int,
    window: int | None,
    source: str,
    note: Callable[[str], None],
) -> list[Row]:
    """Like `fitting_rows`, for the held-out problems; source: the config field that names them.

    The first `in_both` of them (None: all) must also fit with `teacher_role`'s context, since a
    teacher answers them or scores their answers. Raises UserError if none is left.
    """
    if window is None and not prompts.may_be_unreadable:
        return list(rows)
    window = maxsize if window is None else window
    needed, read, where = [], 0, f"{source}: held-out problem"
    with _numbered(rows, where):
        for row, alone in zip(rows, tokens_needed(rows, prompts, ["student"], answer), strict=True):
            if in_both is None or read < in_both:
                alone = max(alone, len(prompts.ids(row, teacher_role)) + answer)
            needed.append(alone)
            read += alone <= window
    kept = _within(rows, needed, answer, window, prompts, where, note)
    if rows and not kept:
        raise UserError(f"{source}: no held-out problem fits the model's window of {window}")
    return kept


@contextmanager
def _numbered(rows: Sequence[Row], what: str) -> Iterator[None]:
    """Adds the row's number to an UnreadableRowError."""
    try:
        yield
    except UnreadableRowError as error:
        number = next(n for n, row in enumerate(rows, start=1) if row is error.row)
        problem = error.row.problem[:60]
        raise UserError(f"{what} {number} ({problem!r}): {error}") from None


def tokens_needed(
    rows: Sequence[Row], prompts: Prompts, roles: Iterable[str], answer: int | None
) -> list[int]:
    """For each row, the tokens of its longest context and its answer; see `fitting_rows`."""
    needed = [0] * len(rows)
    for role in roles:
        contexts = prompts.lengths(rows, role)
        answers = prompts.lengths(rows, f"{role} target") if answer is None else None
        for i, context in enumerate(contexts):
            needed[i] = max(needed[i], context + (answers[i] if answers else answer))
    return needed


def _doubtful(
    rows: Sequence[Row], prompts: Prompts, roles: Iterable[str], answer: int | None, window: int
) -> list[Row]:
    """The rows that may not fit, by an upper bound on their tokens; see `fitting_rows`."""
    fits = dict.fromkeys(map(id, rows), True)
    for role in roles:
        contexts = prompts.longest(rows, role)
        own = prompts.longest(rows, f"{role} target") if answer is None else [answer] * len(rows)
        for row, context, most in zip(rows, contexts, own, strict=True):
            fits[id(row)] &= context is not None and most is not None and context + most <= window
    return [row for row in rows if not fits[id(row)]]


def _within(
    rows: Sequence[Row],
    needed: Sequence[int],
    answer: int | None,
    window: int,
    prompts: Prompts,
    where: str,
    note: Callable[[str], None],
) -> list[Row]:
    """The rows that need at most `window` tokens. Others raise UserError or are noted. where: the
    config's field and what a row is called."""
    left = [(number, n) for number, n in enumerate(needed, start=1) if n > window]
    if left:
        (number, most), what = left[0], where.partition(": ")[2]
        said = f"{number} needs {most} tokens with its answer, the model's window is {window}"
        if prompts.section.too_long == "error":
            shorter = "rollout" if what == "row" else "eval"
            fits = (answer or 0) + window - max(needed)  # beside the longest context
            mend = f"{shorter}.max_new_tokens={fits} fits, or " if fits > 0 else ""
            raise UserError(
                f"{where} {said} ({len(left)} of {len(rows)} {what}s are too long); {mend}leave "
                f"such {what}s out with prompts.too_long: skip"
            )
        named = ", ".join(str(number) for number, _ in left[:NAMED_ROWS])
        named += ", …" if len(left) > NAMED_ROWS else ""
        note(f"{len(left)} of {len(rows)} {what}s are left out ({named}): {what} {said}")
    return [row for row, n in zip(rows, needed, strict=True) if n <= window]
