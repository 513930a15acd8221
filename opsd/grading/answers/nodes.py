"""The kinds of nodes into which answers are parsed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from opsd.grading.answers.numbers import Number
from opsd.grading.answers.units import Unit


@dataclass(frozen=True)
class Value:
    """A number or an expression. noun: the thing counted, if it is no unit of measurement."""

    text: str
    number: Number | None = None
    unit: Unit | None = None
    noun: str = ""
    percent: bool = False


@dataclass(frozen=True)
class Phrase:
    """Words without mathematics, in canonical form."""

    text: str


@dataclass(frozen=True)
class Choice:
    """The letter of a choice. rest: the choice's own text, if the answer has it."""

    letter: str
    rest: Node | None = None


@dataclass(frozen=True)
class Items:
    """Several answers. kind: "list" or "set", whose order does not matter, or the brackets of a
    tuple or an interval, such as "()" or "[)"."""

    kind: str
    parts: tuple[Node, ...]
    text: str = ""


@dataclass(frozen=True)
class Equal:
    """`name = value`, or a chain of equal values. approximate: for each value, whether `\\approx`
    precedes it. simple: the name is a mere name, not an expression."""

    text: str
    name: str | None
    values: tuple[Node, ...]
    approximate: tuple[bool, ...]
    simple: bool = True


@dataclass(frozen=True)
class Relation:
    """An equation, inequalities or a union of intervals, which only algebra can compare."""

    text: str
    equation: bool = False


@dataclass(frozen=True)
class Grid:
    """A matrix, or the rows of a function by cases (`cases`)."""

    rows: tuple[tuple[Node, ...], ...]
    cases: bool = False


@dataclass(frozen=True)
class Ratio:
    """`2:3`, `1:2:3`, or a time of day. half: it has am or pm. sure: or its hour tells which."""

    parts: tuple[Number, ...]
    clock: bool = False
    sure: bool = False
    half: bool = False


@dataclass(frozen=True)
class Based:
    """Digits in a base other than ten."""

    digits: str
    base: int
    value: int = field(default=0)


@dataclass(frozen=True)
class Unclear:
    """A text that is not understood and equals only the same text. why: the reason, in words."""

    text: str
    why: str


Node = Value | Phrase | Choice | Items | Equal | Relation | Grid | Ratio | Based | Unclear


def names_of(parts: Sequence[Node]) -> list[str] | None:
    """The names of the parts if each has a different one; else None."""
    names = [
        part.name if isinstance(part, Equal) and part.simple else getattr(part, "noun", "")
        for part in parts
    ]
    return names if all(names) and len(set(names)) == len(names) else None


def by_name(parts: Sequence[Node]) -> Sequence[Node]:
    """The parts in alphabetical order, if each has a name: (3, 5) for `y = 5, x = 3`."""
    names = names_of(parts)
    if names is None:
        return parts
    return [part for _, part in sorted(zip(names, parts, strict=True), key=lambda pair: pair[0])]
