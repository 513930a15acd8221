"""Which rows fit the model's window with their answer. A row is left out or refused, never cut.

A row is tokenised only where its size leaves in doubt whether it fits.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from sys import maxsize

from opsd.common.errors import UserError
from opsd.data.prompts import BATCH, Prompts, UnreadableRowError
from opsd.data.rows import Row

NAMED_ROWS = 10  # that are too long, in the note that counts them


def fitting_rows(
    rows: Sequence[Row],
    prompts: Prompts,
    roles: Collection[str],  # those whose contexts are trained on and can be made of a row alone
    answer: int | None,  # tokens of the longest answer; None: a row's own target is its answer
    window: int | None,
    note: Callable[[str], None],
    # Called with the number of rows that were checked since the last call
    advance: Callable[[int], None] = lambda rows: None,
    # Called with each row's number, from 1, and the row
    check: Callable[[int, Row], None] = lambda number, row: None,
) -> list[Row]:
    """The training rows whose longest context and answer are `window` tokens at most (None: any).

    The others are an error, or left out, counted and named by `note`, as `prompts.too_long` says.
    """
    needed = []
    with _numbered(rows, "data.source: row"):
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            for role in roles:
                prompts.rendered(batch, role)  # which the next lines ask for
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
    return _within(rows, needed, window, prompts, "data.source", "row", note)


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
    """`fitting_rows` of the held-out problems, which stand in the field `source`.

    The first `in_both` that fit (None: all) must fit in `teacher_role`'s context too, since a
    teacher answers them or scores their answers. Raises UserError where none is left.
    """
    if window is None and not prompts.may_be_unreadable:
        return list(rows)
    window = maxsize if window is None else window
    needed, read = [], 0
    with _numbered(rows, f"{source}: held-out problem"):
        for row, alone in zip(rows, tokens_needed(rows, prompts, ["student"], answer), strict=True):
            if in_both is None or read < in_both:
                alone = max(alone, len(prompts.ids(row, teacher_role)) + answer)
            needed.append(alone)
            read += alone <= window
    kept = _within(rows, needed, window, prompts, source, "held-out problem", note)
    if rows and not kept:
        raise UserError(
            f"{source} has no held-out problem that fits the model's window of {window}"
        )
    return kept


@contextmanager
def _numbered(rows: Sequence[Row], what: str) -> Iterator[None]:
    """Says which of the rows it is that cannot be read."""
    try:
        yield
    except UnreadableRowError as error:
        number = next(n for n, row in enumerate(rows, start=1) if row is error.row)
        problem = error.row.problem[:60]
        raise UserError(f"{what} {number} ({problem!r}): {error}") from None


def tokens_needed(
    rows: Sequence[Row], prompts: Prompts, roles: Iterable[str], answer: int | None
) -> list[int]:
    """The tokens of each row's longest context and of its answer; see `fitting_rows`."""
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
    """The rows that may not fit by the bound on their tokens; as for `fitting_rows`."""
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
    window: int,
    prompts: Prompts,
    source: str,
    what: str,
    note: Callable[[str], None],
) -> list[Row]:
    """The rows that need `window` tokens at most; the others are an error, or counted and named."""
    left = [(number, n) for number, n in enumerate(needed, start=1) if n > window]
    if left:
        number, most = left[0]
        said = (
            f"{what} {number} needs {most} tokens with its answer, the model's window is {window}"
        )
        if prompts.section.too_long == "error":
            shorter = "eval" if what.startswith("held-out") else "rollout"
            raise UserError(
                f"{source}: {said} ({len(left)} of {len(rows)} {what}s are too long); shorten "
                f"{shorter}.max_new_tokens, or leave such {what}s out with prompts.too_long: skip"
            )
        named = ", ".join(str(number) for number, _ in left[:NAMED_ROWS])
        named += ", …" if len(left) > NAMED_ROWS else ""
        note(f"{len(left)} of {len(rows)} {what}s are left out ({named}): {said}")
    return [row for row, n in zip(rows, needed, strict=True) if n <= window]
