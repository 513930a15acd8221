"""What an answer can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from opsd.grading.answers.numbers import Number
from opsd.grading.answers.units import Unit


@dataclass(frozen=True)
class Value:
    """A number or an expression. `noun`: of what, where that is no unit of measurement."""

    text: str
    number: Number | None = None
    unit: Unit | None = None
    noun: str = ""
    percent: bool = False


@dataclass(frozen=True)
class Phrase:
    """Words alone, in canonical form."""

    text: str


@dataclass(frozen=True)
class Choice:
    """One of several given answers by its letter, perhaps with the answer itself."""

    letter: str
    rest: Node | None = None


@dataclass(frozen=True)
class Items:
    """Several answers. `kind`: "list" and "set", where order does not matter, or the brackets of a
    tuple or an interval, such as "()" and "[)"."""

    kind: str
    parts: tuple[Node, ...]
    text: str = ""


@dataclass(frozen=True)
class Equal:
    """`name = value`, or a chain of values; `approximate` says of each that `\\approx` precedes it.
    `simple`: the name is a name, not an expression."""

    text: str
    name: str | None
    values: tuple[Node, ...]
    approximate: tuple[bool, ...]
    simple: bool = True


@dataclass(frozen=True)
class Relation:
    """What only algebra compares: an equation, inequalities, a union of intervals."""

    text: str
    equation: bool = False


@dataclass(frozen=True)
class Grid:
    """A matrix, or the rows of a function by cases (`cases`)."""

    rows: tuple[tuple[Node, ...], ...]
    cases: bool = False


@dataclass(frozen=True)
class Ratio:
    """`2:3`, `1:2:3`, or a time of day. `half`: am or pm is said; `sure`: or its hour says it."""

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
    """Not understood. It equals the same text only; `why`: for people."""

    text: str
    why: str


Node = Value | Phrase | Choice | Items | Equal | Relation | Grid | Ratio | Based | Unclear


def names_of(parts: Sequence[Node]) -> list[str] | None:
    """What the parts are called, where each has a name of its own."""
    names = [
        part.name if isinstance(part, Equal) and part.simple else getattr(part, "noun", "")
        for part in parts
    ]
    return names if all(names) and len(set(names)) == len(names) else None


def by_name(parts: Sequence[Node]) -> Sequence[Node]:
    """In the alphabet's order, where each part has a name: (x, y) of `y = 5, x = 3`."""
    names = names_of(parts)
    if names is None:
        return parts
    return [part for _, part in sorted(zip(names, parts, strict=True), key=lambda pair: pair[0])]
