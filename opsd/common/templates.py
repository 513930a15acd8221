"""Jinja templates for the roles' messages and for chats. Needs no torch.

A template may come from a stranger: with a config, with a model, with a run to compare. Jinja's own
sandbox keeps it away from Python's insides, but not from the machine's time and memory. So it is
parsed, compiled and filled in by a worker process (`workers`), many rows at a time. Filled in
here are templates that this package ships, and those that a worker found to be linear.
"""

import dataclasses
import datetime
import io
import pickle
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import chain
from types import SimpleNamespace
from typing import Any

from opsd.common.errors import UserError
from opsd.common.template_worker import MADE, MOST, REFUSED, answer, prompts, texts_of
from opsd.common.workers import Ended, Workers

ROLLOUT_NAMES = frozenset({"rollout", "peers"})
"""Names that a template over rollouts may use beside the row's columns."""

BATCH_ROWS, MOST_ROWS, BATCH_BYTES = 64, 4096, 1 << 20
QUICK = 0.05  # seconds
MOST_NODES = 1000  # of a template that is filled in here
SECONDS = 1.0  # of processor time for a batch: a hundred times as much as honest ones take
MEMORY = 150 << 20  # bytes beside the 43 MB that a worker starts with

Chats = Iterable[tuple[Sequence[Mapping[str, Any]], bool]]

_WORKERS = Workers("opsd.common.template_worker", seconds=SECONDS, memory=MEMORY)
_SHIPPED: set[str] = set()
_PLAIN_TYPES = {str, int, float, bool, type(None)}
_PLAIN = frozenset({"builtins", "collections", "datetime", "decimal", "types", "uuid"})


class TemplateFailure(ValueError):
    """The template cannot be compiled or filled in; the message says why."""


def shipped(text: str) -> str:
    """The same text, which is trusted from now on. For texts in this package's code only."""
    _SHIPPED.add(text)
    return text


def check_template(field: str, text: str) -> None:
    """Raises UserError where the field's text is no template."""
    try:
        fill_in(text, [])
    except TemplateFailure as error:
        raise UserError(f"{field} is not a Jinja template: {error}") from None


def fill_in(text: str, values: Iterable[Mapping[str, Any]]) -> list[str]:
    """The template's text for each of the values. Raises TemplateFailure."""
    values = list(values)
    made = _filled_in_here(text, values)
    return _answers(text, "prompts", (text,), values) if made is None else made


def fill_in_chat(text: str, arguments: dict, date: datetime.date, chats: Chats) -> list[str]:
    """A chat template's text for each (messages, add_generation_prompt), as transformers renders it
    with these arguments, special tokens too, on this date. Raises TemplateFailure."""
    return _answers(text, "chats", (text, arguments, date), chats)


def over_rollouts(text: str) -> bool:
    """Whether a template uses a problem's rollouts, so that it is rendered once they are there."""
    return bool(names(text) & ROLLOUT_NAMES)


@cache
def names(text: str) -> frozenset[str]:
    """The variables that a template uses but does not set; none for text that is no template."""
    try:
        return frozenset(_answers(text, "names", (text,), ()))
    except TemplateFailure:
        return frozenset()


def _filled_in_here(text: str, values: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """What a worker would make, without the way there and back, where no text can make it take more
    than its length; None where it could, and where it would be an error."""
    shown = list(chain.from_iterable(one.values() for one in values))
    kinds = {*map(type, shown)}
    if not shown or kinds - _PLAIN_TYPES or not 0 < (count := _linear(text)) < MOST_NODES:
        return None
    texts = shown if kinds == {str} else [value for value in shown if type(value) is str]
    if count * (max(map(len, texts), default=0) + len(text)) > MOST:
        return None
    try:
        made = list(prompts(text, values))
        if not all(map(str.isascii, made)):
            "".join(made).encode()  # an error where it has half a surrogate pair
        return made
    except Exception:
        return None


@cache
def _linear(text: str) -> int:
    return int("".join(_answers(text, "linear", (text,), ())) or 0)


def _answers(text: str, name: str, arguments: tuple, values: Iterable[Any]) -> list[str]:
    """One batch at a time, so that the first that fails is the last; one at least. Batches grow
    while they are quick, since each costs two changes of process. One that fails is tried again
    in small ones: together, honest rows may take too much."""
    ask = answer if text in _SHIPPED else _ask
    values, start, rows, most = list(values), 0, BATCH_ROWS, MOST_ROWS
    made: list[Any] = []
    while start < max(1, len(values)):
        job = _job(name, arguments, values[start : start + rows])
        if len(job) > BATCH_BYTES and rows > 1:
            rows = most = rows // 2
            continue
        begun = time.monotonic()
        reply = ask(job)
        if reply[:1] == MADE:
            made += texts_of(reply)
            start += rows
            rows = min(2 * rows if time.monotonic() - begun < QUICK else BATCH_ROWS, most)
        elif rows > BATCH_ROWS:
            rows = most = BATCH_ROWS
        else:
            raise TemplateFailure(reply[1:].decode())
    return made


def _job(*parts: Any) -> bytes:
    """A message to the worker."""
    stream = io.BytesIO()
    _Pickler(stream, 5).dump(parts)
    return stream.getvalue()


def _ask(job: bytes) -> bytes:
    (reply,) = _WORKERS.answers([job])
    if reply == Ended("killed"):  # by the system perhaps: once more
        (reply,) = _WORKERS.answers([job])
    return REFUSED + _WHY[reply.why].encode() if isinstance(reply, Ended) else reply


_WHY = {
    "time": f"it takes too much: more than {SECONDS:g} s of processor time",
    "memory": f"it takes too much: more than {MEMORY >> 20} MB of memory",
    "killed": "the process that fills it in was killed twice",
}


class _Pickler(pickle.Pickler):
    """Plain data as they are, dataclasses as records, of anything else what `{{ }}` writes."""

    def reducer_override(self, value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return SimpleNamespace, (), fields
        if getattr(value, "__module__", type(value).__module__) in _PLAIN:
            return NotImplemented
        return str, (str(value),)
