"""Read rows, problems with solutions and answers, from a source (`sources.py`) or from Python
objects: a list of dicts, a `datasets.Dataset`. A row may hold a chat instead (`chats.py`).

For a bad source it raises UserError, naming the field (such as `data.columns`), its value and what
it may be. Heavy libraries are imported by the functions that need them.
"""

import math
import os
import random
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from opsd.common.errors import UserError
from opsd.common.near import USUAL, nearest
from opsd.data.chats import (
    CHAT_COLUMNS,
    Chat,
    NotTextError,
    last_answer,
    parsed,
    read_chat,
    read_pair,
)
from opsd.data.files import TABLES, file_type
from opsd.data.given import given_records
from opsd.data.images import RowImage, UnreadableImageError, read_images
from opsd.data.references import Unreadable, final_answer
from opsd.data.sources import (
    DEFAULT_DRAW,
    REASONING_GYM,
    check_names,
    check_no_split,
    draw,
    kind_of,
    stored,
)

COLUMNS = ("problem", "solution", "answer")
NO_TEXT = ("image", "images", "video", "videos", "audio", "audios")
"""Columns without which a problem is incomplete; prompts show only the images of columns.images."""

MISSING = ("nan", "<na>", "null")  # as pandas writes it
OF_TEMPLATE = ("tools", "documents", "chat_template_kwargs")
"""A chat's columns that other trainers give to its chat template."""


@dataclass(frozen=True)
class Row:
    """One problem. columns: all columns of the source, for templates.

    answer: the bare final answer (`opsd.data.references`): if the source's answer has GSM8K's
    `####` or a `\\boxed{}`, the text after the mark or the content of the last box. A text that is
    not required and that the source lacks is "".
    """

    problem: str
    solution: str
    answer: str
    columns: dict[str, Any]
    history: tuple[dict[str, str], ...] = ()  # the chat's messages before the problem
    images: tuple[RowImage, ...] = ()
    held: bool = False  # shown to the teacher as to the student, whatever prompts.hold says

    @property
    def texts(self) -> dict[str, str]:
        """The problem, solution and answer, by name."""
        return {"problem": self.problem, "solution": self.solution, "answer": self.answer}

    @property
    def same_problem(self) -> tuple[str, ...]:
        """A key that is equal for rows of the same problem: its images, and its text without
        differences of white space and case."""
        text = " ".join(self.problem.split()).casefold()
        return text, *(image.digest for image in self.images)


class IncompleteRowError(UserError):
    """A row lacks a required text, or has one that cannot be used."""


def load_rows(
    source: str | Iterable[Mapping[str, Any]],
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    default_split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    size: int | None = None,
    options: Mapping[str, Any] | None = None,
    require: Sequence[str] = COLUMNS,
    section: str = "data",
    graded: bool = True,
    skip_incomplete: bool = False,
    note: Callable[[str], None] | None = None,
) -> list[Row]:
    """Read the rows of a source, in its order.

    source: a file, a directory saved by `datasets`, a hub name, reasoning_gym:<task>, or records.
    columns: problem, solution, answer or images → the source's column; dots reach into a column. Of
        a chat, the last user message is the problem and the assistant's last one the solution;
        without a column `problem`, usual columns of chats and Alpaca's are tried. images: a column
        of one or several images (`images.read_images`); without it rows with images are refused.
    split: by default `default_split`. seed, size: for reasoning_gym (default 1000, or `limit`).
    options: for reasoning_gym the task's own; for the hub `name` (configuration) and `revision`;
        for a directory of files `name`.
    require: the columns that must have text in each row; a number is an answer too.
    section: the config's, for messages. graded: each required answer must have a final answer.
    skip_incomplete: leave out rows without a required text, and count them by `note`.

    Raises UserError if the source is missing or has no rows, or a row lacks a required column.

    >>> from pathlib import Path
    >>> _ = Path("rows.jsonl").write_text('{"question": "2 + 2?", "answer": "4"}')
    >>> load_rows("rows.jsonl", columns={"problem": "question"}, require=["problem"])[0].answer
    '4'
    """
    columns, options = dict(columns or {}), dict(options or {})
    check_names(f"{section}.columns", columns, (*COLUMNS, "images"), USUAL)
    for field, value in (("limit", limit), ("size", size)):
        if value is not None and value < 1:
            raise UserError(f"{section}.{field}: {value!r} is not a positive number")
    source = os.fspath(source) if isinstance(source, os.PathLike) else source
    raw: Any = source
    base = None
    if not isinstance(source, str):
        theirs, base = {name: name for name in COLUMNS}, Path.cwd()
        source = f"the {type(source).__name__} that was given"
        raw, split = given_records(raw, split, default_split, section)
    elif source.startswith(REASONING_GYM):
        theirs = {"problem": "question", "answer": "answer", "solution": "metadata.answer_cot"}
        raw = draw(source, size or limit or DEFAULT_DRAW, seed, options, section)
    else:
        theirs = {name: name for name in COLUMNS}
        if size is not None:
            who = "only reasoning_gym draws a number of problems"
            raise UserError(f"{section}.size: {who}; for {source!r} use `limit`")
        raw, split = stored(source, split, default_split, options, section), None
        place = Path(os.path.expanduser(source))
        base = place if place.is_dir() else place.parent if place.exists() else None
    check_no_split(source, split, section)
    theirs |= columns
    # A reasoning_gym task decides itself what an answer is.
    graded = graded and "answer" in require and not source.startswith(REASONING_GYM)
    table = file_type(Path(source)) in TABLES
    told = source, section, graded, table, base
    reader = _Reader(theirs, frozenset(columns), frozenset(require), *told)
    rows: list[Row] = []
    incomplete: list[IncompleteRowError] = []
    for number, record in enumerate(raw, start=1):
        try:
            rows.append(reader.row(record, number))
        except IncompleteRowError as error:
            if not skip_incomplete:
                hint = "; data.incomplete=skip leaves such rows out"
                raise UserError(f"{error}{hint if rows and section == 'data' else ''}") from None
            incomplete.append(error)
        if limit is not None and len(rows) == limit:
            break
    if not rows:
        raise (
            incomplete[0] if incomplete else UserError(f"{section}.source: {source!r} has no rows")
        )
    if incomplete and note is not None:
        said = str(incomplete[0]).removeprefix(f"{section}.source: ")
        note(f"{len(incomplete)} rows are left out as incomplete; the first: {said}")
    return rows


def mixture(sources: Sequence[tuple[Sequence[Row], float]], seed: int) -> list[Row]:
    """The rows of all sources, each source repeated by its weight.

    A weight of 2 repeats each row twice; 0.5 takes half of the rows, drawn by `seed`; 1.5 takes all
    rows and half of them again. A source with a positive weight keeps at least one row.
    """
    mixed: list[Row] = []
    for number, (rows, weight) in enumerate(sources):
        whole, part = divmod(weight, 1)
        mixed += list(rows) * int(whole)
        count = round(part * len(rows))
        if not whole and not count and weight > 0 and rows:
            count = 1
        chosen = random.Random(f"{seed}:{number}").sample(range(len(rows)), count)
        mixed += [rows[index] for index in sorted(chosen)]
    return mixed


def varied(rows: Sequence[Row], copies: int, seed: int) -> list[Row]:
    """Copies of rows with other numbers, of as many digits, in the problem, and no solution."""
    draw, made = random.Random(f"{seed}:varied"), []
    for row in [row for row in rows for _ in range(copies)]:
        texts, others = re.split("([0-9]+)", row.problem), dict[str, str]()
        for number in dict.fromkeys(texts[1::2]):  # the same one everywhere
            digits = [draw.randint(not i and was != "0", 9) for i, was in enumerate(number)]
            others[number] = "".join(map(str, digits))
        text = "".join(others.get(text, text) for text in texts)
        columns = dict(row.columns)
        columns |= {n: text for n, own in columns.items() if str(own) == row.problem}
        if others:
            made.append(Row(text, "", "", columns, row.history, row.images, held=True))
    return made


def split_rows(
    rows: Sequence[Row], heldout: int, seed: int, step: int = 1
) -> tuple[list[Row], list[Row]]:
    """(train, held out): draw `heldout` distinct problems by `seed`; train on all other rows.

    No problem is in both lists, even if several rows have it; see `Row.same_problem`.
    Raises UserError if there would be nothing to train on; it says how many leave `step` rows.
    """
    first: dict[tuple[str, ...], int] = {}
    for index, row in enumerate(rows):
        first.setdefault(row.same_problem, index)
    if not 0 <= heldout < len(first):
        had = f"data with {len(first)} distinct problems (0 to {max(0, len(first) - step)} can)"
        raise UserError(f"eval.problems: {heldout} held-out problems cannot be taken from {had}")
    chosen = set(random.Random(seed).sample(list(first), heldout))
    kept = [row for row in rows if row.same_problem not in chosen]
    return kept, [rows[index] for problem, index in first.items() if problem in chosen]


@dataclass(frozen=True)
class _Reader:
    """Makes rows from a source's records.

    theirs: our column → the source's. mapped: columns that the user has named; the first row must
    have them. required: columns that need text in each row. table: all values are strings.
    """

    theirs: Mapping[str, str]
    mapped: frozenset[str]
    required: frozenset[str]
    source: str
    section: str
    graded: bool
    table: bool
    base: Path | None  # the directory that paths of images are relative to

    def row(self, record: Any, number: int) -> Row:
        """Make the row of record `number`, from 1. Raises UserError."""
        where = f"{self.section}.source: row {number} of {self.source!r}"
        if not isinstance(record, Mapping):
            known = "write it as {'problem': …, 'solution': …, 'answer': …}"
            raise UserError(f"{where} is {kind_of(record)}, not an object with columns; {known}")
        record = dict(record)
        found = {name: _reach(record, column) for name, column in self.theirs.items()}
        images = self._images(found, record, number, where)
        if "images" in self.theirs:
            record.pop(self.theirs["images"].partition(".")[0], None)
        for name in NO_TEXT:
            if (shown := record.get(name)) and not isinstance(shown, str | int | float):
                raise IncompleteRowError(
                    f"{where} has {name!r}, which no prompt shows"
                    + (f": {self.section}.columns.images={name}" if name[:5] == "image" else "")
                )
        refused = record.get("label") is False and "completion" in record  # as KTO has it
        if refused and "solution" in self.required and not record.get("solution"):
            raise IncompleteRowError(f"{where}: its completion is labelled as bad (label: false)")
        history: tuple[dict[str, str], ...] = ()
        try:
            chat = self._chat(record, found["problem"])
        except NotTextError as error:
            raise IncompleteRowError(f"{where}: its chat {error}") from None
        if chat is not None:
            if of_it := next((name for name in OF_TEMPLATE if parsed(record.get(name))), None):
                raise IncompleteRowError(
                    f"{where} has {of_it!r}, which its prompt would lack: write it as a message, "
                    "or set prompts.student_chat and teacher_chat and remove the column"
                )
            if chat.images not in (0, len(images)):
                raise IncompleteRowError(
                    f"{where}: its chat shows {chat.images} images, its column has {len(images)}"
                )
            history, found["problem"] = chat.history, (True, chat.problem)
            if not found["solution"][0] and "solution" not in self.mapped:
                said = chat.solution or last_answer(record.get("completion", record.get("chosen")))
                found["solution"] = (said is not None, said)
        values = {name: self._text(name, *found[name], record, number, where) for name in COLUMNS}
        if values["answer"]:
            try:
                values["answer"] = final_answer(values["answer"])
            except Unreadable as problem:
                if self.graded:
                    column = self.theirs["answer"]
                    raise IncompleteRowError(
                        f"{where}: column {column!r} (answer) {problem}"
                    ) from None
        return Row(**values, columns=record, history=history, images=images, held=False)

    def _images(
        self, found: dict[str, tuple[bool, Any]], record: dict[str, Any], number: int, where: str
    ) -> tuple[RowImage, ...]:
        if "images" not in self.theirs:
            return ()
        there, value = found["images"]
        if not there and number == 1:
            raise IncompleteRowError(self._missing("images", record, number))
        try:
            return read_images(value, self.base)
        except UnreadableImageError as error:
            column = self.theirs["images"]
            raise IncompleteRowError(f"{where}: column {column!r} (images): {error}") from None

    def _chat(self, record: dict[str, Any], problem: tuple[bool, Any]) -> Chat | None:
        (found, value), seen = problem, "images" in self.theirs
        chats: Iterator[Chat | None]
        if found:
            chats = iter([read_chat(value, seen)])
        elif "problem" in self.mapped:
            return None
        else:
            names = (*CHAT_COLUMNS, "prompt", "chosen")
            chats = (read_chat(record.get(name), seen) for name in names)
        chat = next(filter(None, chats), None) or (None if found else read_pair(record))
        system = record.get("system")  # ShareGPT's rows have it in a separate column
        if chat is None or not isinstance(system, str) or not system.strip():
            return chat
        if any(message["role"] in ("system", "developer") for message in chat.history):
            return chat
        return chat._replace(history=({"role": "system", "content": system}, *chat.history))

    def _text(
        self, name: str, found: bool, value: Any, record: dict, number: int, where: str
    ) -> str:
        """A column's text; "" if it is missing and not required. Raises UserError."""
        column, required = self.theirs[name], name in self.required
        if name == "answer":
            value = _answer_as_text(value, self.table)
        elif name == "solution" and isinstance(value, list):
            value = last_answer(value) or (value[0] if len(value) == 1 else value)
        if name != "answer" and str(value).strip().casefold() in (*MISSING, "none"):
            value = None
        if not found and (required or (name in self.mapped and number == 1)):
            raise IncompleteRowError(self._missing(name, record, number))
        text = isinstance(value, str) and value.strip() != ""
        if required and not text:
            problem = "empty" if value is None or isinstance(value, str) else kind_of(value)
            if isinstance(value, dict) and value:
                keys = ", ".join(map(repr, value))
                problem += f" with {keys}: {self.section}.columns.{name} can name one of these, as "
                usual = (key for key in USUAL[name] if key in value)
                problem += repr(f"{column}.{next(usual, next(iter(value)))}")
            elif isinstance(value, list) and value and isinstance(value[0], str):
                problem += f": {self.section}.columns.{name} can name one, as '{column}.0'"
            raise IncompleteRowError(
                f"{where} has no text in column {column!r} ({name}): it is {problem}"
            )
        if text and not value.isascii() and re.search("[\ud800-\udfff]", value):
            half = "half of a surrogate pair, which is no character and cannot be tokenised"
            raise UserError(f"{where}: column {column!r} ({name}) holds {half}")
        return value if text else ""

    def _missing(self, name: str, record: dict, number: int) -> str:
        column, present = self.theirs[name], list(_paths(record))
        chat = next((c for c in CHAT_COLUMNS if c in record), None)
        if chat is not None and name == "problem":
            return (
                f"{self.section}.source: row {number} of {self.source!r}: {chat!r} is no chat with "
                "a user's message (a list of objects, each with `role` and the text `content`)"
            )
        absent = [one for one in COLUMNS if one in self.required]
        absent = [one for one in absent if not chat and not _reach(record, self.theirs[one])[0]]
        meant = {one: self._near(one, present) for one in dict.fromkeys([name, *absent])}
        pairs, near = [f"{ours}={theirs}" for ours, theirs in meant.items() if theirs], meant[name]
        setting = shlex.join(f"{self.section}.columns.{pair}" for pair in pairs)
        if self.section == "benchmark":
            setting = f"--columns {shlex.quote(','.join(pairs))}"
        hint = f" (did you mean {near!r}? {setting})" if near else ""
        nor = "".join(f" nor {one!r}" for one in absent if one != name and not meant[one])
        if self.table and name == "problem" and not near:
            hint = " (a table's first line names its columns, as in problem,solution,answer)"
        if name == "solution" and chat is not None and not near:
            hint = " (nor does its chat end with an answer to learn)"
        if name == "answer" and self.section == "data" and not near:
            hint = " (rows without answers: eval.problems=0, for grpo also loss.reward.verifier)"
        return (
            f"{self.section}.columns.{name}: {f'row {number} of ' * (number > 1)}{self.source!r} "
            f"has no column {column!r}{nor}{hint}; it has {', '.join(map(repr, present)) or 'none'}"
        )

    def _near(self, name: str, present: list[str]) -> str | None:
        """The column that may be ours of this name."""
        leaves = {path.rpartition(".")[2].casefold(): path for path in reversed(present)}
        usual = (leaves[one] for one in USUAL[name] if one in leaves)
        own = name if name in present else None
        near = nearest(self.theirs[name], present, 0.7) or own or next(usual, None)
        return near or nearest(self.theirs[name], [one for one in present if one not in COLUMNS])


def _answer_as_text(value: Any, table: bool) -> Any:
    """An answer as text: 8.0 becomes "8" (also "8.0" in a table), true "True"; a list is joined
    by commas, and pandas' words for a missing value become None. Others stay as they are."""
    several = isinstance(value, list | tuple) and value
    if several and all(isinstance(one, str | int | float) for one in value):
        texts = [_answer_as_text(one, table) for one in value]
        return ", ".join(texts) if all(isinstance(text, str) for text in texts) else value
    if isinstance(value, str):
        if value.strip().casefold() in MISSING:
            return None
        return value[:-2] if table and re.fullmatch(r"[-+]?\d+\.0", value) else value
    if isinstance(value, float) and math.isfinite(value):
        whole = value.is_integer() and abs(value) < 2**53
        return str(int(value)) if whole else _shortest(value)
    if isinstance(value, Decimal) and value.is_finite():
        return f"{value.normalize():f}"
    return str(value) if isinstance(value, int | Fraction) else value


def _shortest(value: float) -> str:
    """The shortest decimal that gives this number: 0.1 for the fp32 that is next to 0.1 too, which
    as a Python number is 0.10000000149011612."""
    import numpy as np

    with np.errstate(over="ignore"):
        single = np.float32(value)
    return repr(float(str(single))) if float(single) == value else repr(value)


def _reach(record: Any, column: str) -> tuple[bool, Any]:
    """(whether the column exists, its value). Dots reach into objects, also those in JSON strings,
    and numbers into lists: -1 is the last entry."""
    record = parsed(record)
    if isinstance(record, dict) and column in record:
        return True, record[column]
    head, dot, rest = column.partition(".")
    if isinstance(record, list):
        try:
            inside = record[int(head)]
        except (ValueError, IndexError):
            return False, None
        return _reach(inside, rest) if dot else (True, inside)
    if dot and isinstance(record, dict) and head in record:
        inside = record[head]
        return (True, None) if inside is None else _reach(inside, rest)
    return False, None


def _paths(record: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in record.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")
