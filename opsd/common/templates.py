"""Render Jinja templates for the roles' messages and for chats. Needs no torch.

A template may come from a stranger: with a config, with a model, with a run to compare. Jinja's own
sandbox keeps it away from Python's internals, but does not limit its time and memory. So a worker
process (`workers`) parses, compiles and renders it, many rows at a time. This process renders only
the templates that this package ships, and joins the pieces of rows alike (`skeletons`).
"""

import dataclasses
import datetime
import io
import pickle
import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any

from opsd.common.errors import UserError
from opsd.common.near import USUAL, did_you_mean
from opsd.common.skeletons import SHAPES, Skeletons
from opsd.common.template_worker import MADE, MOST, REFUSED, answer, texts_of
from opsd.common.workers import Ended, Workers

ROLLOUT_NAMES = frozenset({"rollout", "peers"})
"""Names that a template rendered after sampling may use in addition to the row's columns."""

SOLUTION_NAMES = frozenset({"solution", "answer"})
"""Names of a row's texts for which its rollouts' majority can stand."""

BATCH_ROWS, MOST_ROWS, BATCH_BYTES = 64, 4096, 1 << 20
QUICK = 0.05  # seconds: after a faster batch the next one is twice as large
ROUNDS, ASKED = 8, 8  # of questions for skeletons, and values in each
SECONDS = 1.0  # of processor time for a batch: a hundred times what ordinary templates take
MEMORY = 120 << 20  # bytes on top of the 43 to 70 MB that a worker starts with

Chats = Iterable[tuple[Sequence[Mapping[str, Any]], bool]]

_WORKERS = Workers("opsd.common.template_worker", seconds=SECONDS, memory=MEMORY)
_SHIPPED: set[str] = set()
_PLAIN = frozenset({"builtins", "collections", "datetime", "decimal", "types", "uuid"})


class TemplateFailure(ValueError):
    """The template cannot be compiled or rendered; the message says why."""


def shipped(text: str) -> str:
    """Mark a template as trusted and return it. For templates in this package's code only."""
    _SHIPPED.add(text)
    return text


def check_template(field: str, text: str) -> None:
    """Raises UserError if the field's text is not a valid template."""
    try:
        fill_in(text, [])
    except TemplateFailure as error:
        hint = "" if "; " in str(error) else "; a column is written {{ problem }}"
        raise UserError(f"{field} is not a Jinja template: {error}{hint}") from None


def check_shows(field: str, text: str, what: str) -> None:
    """Raises UserError for what is no template, and for one that can show no row's problem or
    solution, as `what` says: it has no columns, or this one in single braces."""
    check_template(field, text)
    plain = in_single_braces(text, [what]) or not re.search("{[{%]", text)
    if plain and what not in names(text):
        single = in_single_braces(text, re.findall(r"{\s*(\w+)\s*}", text)) or ""
        said = f"leaves the {what} out ({single or repr(text)} is plain text)"
        raise UserError(f"{field} {said}: write {{{{ {single.strip('{} ') or what} }}}}")


def in_single_braces(text: str, columns: Collection[str]) -> str | None:
    r"""The first `{column}` in a template, but not `{{ column }}` nor LaTeX's `\boxed{answer}`."""
    wanted = "|".join(map(re.escape, columns))
    found = re.search(rf"(?<![\w\\{{}}%]){{\s*(?:{wanted})\s*}}(?!}})", text)
    return found.group() if found else None


def fill_in_columns(field: str, text: str, values: Sequence[Mapping[str, Any]]) -> list[str]:
    """Render the field's template for rows of these columns. Raises UserError."""
    try:
        return fill_in(text, [{k: one[k] for k in names(text) & one.keys()} for one in values])
    except TemplateFailure as error:
        columns, unknown = sorted(values[0]), re.search(r"'(\w+)' is undefined", str(error))
        name = unknown[1] if unknown else ""
        inside = re.search(rf"\b{name}(?:\.|\[['\"])(\w+)", text) if name else None  # row.problem
        name = inside[1] if inside else name
        ours = (our for our, theirs in USUAL.items() if name in theirs and our in columns)
        hint = did_you_mean(next(ours, name), columns)
        said = f"{error}; columns: {', '.join(columns)}{hint}"
        raise UserError(f"{field} cannot be filled in: {said}") from None


def fill_in(text: str, values: Iterable[Mapping[str, Any]]) -> list[str]:
    """Render the template for each of the values. Raises TemplateFailure."""
    return _answers(text, "prompts", (text,), values)


def fill_in_chat(text: str, arguments: dict, date: datetime.date, chats: Chats) -> list[str]:
    """Render a chat template for each (messages, add_generation_prompt), as transformers does with
    these arguments, special tokens included, on this date. Raises TemplateFailure."""
    return _answers(text, "chats", (text, arguments, date), chats)


def over_rollouts(text: str) -> bool:
    """Whether a template uses a problem's rollouts, so that it is rendered after sampling."""
    return bool(names(text) & ROLLOUT_NAMES)


@cache
def names(text: str) -> frozenset[str]:
    """The variables that a template uses but does not set; none for an invalid template."""
    try:
        return frozenset(_answers(text, "names", (text,), ()))
    except TemplateFailure:
        return frozenset()


def _answers(text: str, name: str, arguments: tuple, values: Iterable[Any]) -> list[str]:
    """The text for each value: put together here where it is like one that was learnt, else made by
    a worker. What a template makes is learnt once it has made some, if there are more."""
    values = list(values)
    if name not in SHAPES or not values:
        return _made(text, name, arguments, values)
    known = _known(text, name, bytes(_job(*arguments)))
    made: list[Any] = [known.fill(value) for value in values]

    def make(numbers: list[int]) -> None:
        known.made += len(numbers)
        texts = _made(text, name, arguments, [values[number] for number in numbers])
        for number, one in zip(numbers, texts, strict=True):
            made[number] = one

    for _ in range(ROUNDS):
        rest = [number for number, one in enumerate(made) if one is None]
        if not rest or known.made + len(rest) <= BATCH_ROWS:
            break
        make(first := rest[:BATCH_ROWS])
        new = [number for number in first if known.is_new(values[number])][:ASKED]
        if not new:
            break
        begun = time.monotonic()
        reply = _reply(text, _job("skeletons", (name, arguments), [values[n] for n in new]))
        said = texts_of(reply) if reply[:1] == MADE else [""] * len(new)
        for number, one in zip(new, said, strict=True):
            known.learn(values[number], made[number], one)
        known.seconds += time.monotonic() - begun
        for number in rest[BATCH_ROWS:]:
            made[number] = known.fill(values[number])
    if rest := [number for number, one in enumerate(made) if one is None]:
        make(rest)
    return made


@lru_cache(64)
def _known(text: str, name: str, arguments: bytes) -> Skeletons:
    return Skeletons(name, MOST)


def _made(text: str, name: str, arguments: tuple, values: list) -> list[str]:
    """Send the values to a worker in batches, at least one, and stop at the first that fails.
    Batches grow while they are quick, since each costs two context switches. A large batch that
    fails is tried again in small ones: many ordinary rows may exceed the limits together."""
    start, rows, most, made = 0, BATCH_ROWS, MOST_ROWS, list[str]()
    stream = io.BytesIO()  # one for all batches: new memory costs as much time as pickling
    while start < max(1, len(values)):
        with _job(name, arguments, values[start : start + rows], stream=stream) as job:
            if len(job) > BATCH_BYTES and rows > 1:
                rows = most = rows // 2
                continue
            begun = time.monotonic()
            reply = _reply(text, job)
        if reply[:1] == MADE:
            made += texts_of(reply)
            start += rows
            rows = min(2 * rows if time.monotonic() - begun < QUICK else BATCH_ROWS, most)
        elif rows > BATCH_ROWS:
            rows = most = BATCH_ROWS
        else:
            raise TemplateFailure(reply[1:].decode())
    return made


def _reply(text: str, job: memoryview) -> bytes:
    return answer(job) if text in _SHIPPED else _ask(job)


def _job(*parts: Any, stream: io.BytesIO | None = None) -> memoryview:
    """Pickle a message to the worker over what the stream held; release it before the next."""
    stream = stream or io.BytesIO()
    stream.seek(0)
    _Pickler(stream, 5).dump(parts)
    return stream.getbuffer()[: stream.tell()]


def _ask(job: memoryview) -> bytes:
    (reply,) = _WORKERS.answers([job])
    if reply == Ended("killed"):  # perhaps by the system: try once more
        (reply,) = _WORKERS.answers([job])
    return REFUSED + _WHY[reply.why].encode() if isinstance(reply, Ended) else reply


_WHY = {
    "time": f"it takes too much: more than {SECONDS:g} s of processor time",
    "memory": f"it takes too much: more than {MEMORY >> 20} MB of memory",
    "killed": "the process that fills it in was killed twice",
}


class _Pickler(pickle.Pickler):
    """Pickles plain data as they are, dataclasses as records, anything else as its str()."""

    def reducer_override(self, value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return SimpleNamespace, (), fields
        if getattr(value, "__module__", type(value).__module__) in _PLAIN:
            return NotImplemented
        return str, (str(value),)
