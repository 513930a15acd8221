"""What a template makes of every row that is like one, found out once. Needs no torch.

A template that only shows, trims and tests a row's texts makes the same text of all rows of one
shape but for what it shows. A worker fills it in with texts that nothing can look into
(`symbolic`), and answers with the pieces, and with the tests of texts on which they depend. Rows
that pass the same tests are then put together here, by operations of linear time alone.
"""

import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TRIMS = ("strip", "lstrip", "rstrip", "removeprefix", "removesuffix")
METHODS = (*TRIMS, "upper", "lower", "capitalize", "replace")
OPEN = {str, int, float}  # what a row may have another of, and be like it
PLAIN = {*OPEN, bool, type(None)}
FIXED = {str, int, bool, type(None)}  # no floats: 0.0 and -0.0 are equal
LONGEST = 1000  # characters of what a template tests for or trims away
GROWTH = 3  # times the length that a text may have in upper case
MOST_LEARNT = 200  # values; a template whose values are never alike is left to the worker
MOST_SECONDS = 1.0  # for learning of a template; what it learns slowly is left to the worker too
MOST_KEPT = 1 << 22  # characters in the pieces of all that was learnt
MOST_WORK = 1 << 21  # characters that are passed over for a value
DIGITS = 5000  # more than Python writes of a number

Shape = tuple
Piece = str | Sequence  # text, or a hole's number and the operations on it


def derived(holes: Sequence[Any], piece: Sequence) -> Any:
    """What stands in a hole, after the piece's operations."""
    number, operations = piece
    value = holes[number]
    for name, *arguments in operations:
        if name == "text":
            value = str(value)
        elif name == "split":
            value = value.split(arguments[0])[arguments[1]]
        elif name == "slice":
            value = value[slice(*arguments)]
        elif name == "length":
            value = len(value)
        elif name in METHODS:
            value = getattr(value, name)(*arguments)
        else:
            raise ValueError(name)
    return value


TESTS: dict[str, Callable[[Any, Any], Any]] = {
    "true": lambda value, _: bool(value),
    "equal": lambda value, other: value == other,
    "contains": lambda value, part: part in value,
    "startswith": lambda value, part: value.startswith(part),
    "endswith": lambda value, part: value.endswith(part),
    "count": lambda value, part: value.count(part),
    "less": operator.lt,
    "at_most": operator.le,
    "more": operator.gt,
    "at_least": operator.ge,
}


def prompt_shape(row: Mapping[str, Any]) -> tuple[Shape, list] | None:
    """What makes a row like another, and what may differ; None where it is like no other."""
    kinds = [*map(type, row.values())]
    if not {*kinds} <= PLAIN:
        return None
    holes = [value for value in row.values() if type(value) in OPEN]
    if len(holes) == len(kinds):
        return (*row, *kinds), holes
    return (*row, *kinds, *(v for v in row.values() if type(v) not in OPEN)), holes


def chat_shape(chat: tuple[Sequence[Mapping[str, Any]], bool]) -> tuple[Shape, list] | None:
    """The same of a chat: what messages say may differ; all else makes the shape."""
    shape: list = [chat[1]]
    holes: list = []
    for message in chat[0]:
        shape.append(len(message))
        for key, value in message.items():
            if key == "content" and type(value) is str:
                holes.append(value)
                shape.append(str)
            elif key == "content" and type(value) is list:
                shape.append(len(value))
                for part in value:
                    if type(part) is not dict or not _add(part, "text", shape, holes):
                        return None
            elif type(key) is str and type(value) in FIXED:
                shape += key, type(value), value
            else:
                return None
    return tuple(shape), holes


def _add(part: dict, name: str, shape: list, holes: list) -> bool:
    """Add a part of a message; returns whether that can be done."""
    shape.append(len(part))
    for key, value in part.items():
        if key == name and type(value) is str:
            holes.append(value)
            value = str
        elif type(key) is not str or type(value) not in FIXED:
            return False
        shape += key, type(value), value
    return True


SHAPES: dict[str, Callable[[Any], tuple[Shape, list] | None]] = {
    "prompts": prompt_shape,
    "chats": chat_shape,
}


class Skeletons:
    """All that is known of one template with one set of arguments.

    name: what it fills in, of SHAPES; most: characters that a text may have.
    """

    def __init__(self, name: str, most: int) -> None:
        self._shape = SHAPES[name]
        self.most = most
        self.made = 0  # texts by the worker so far
        self.seconds = 0.0  # that learning has taken
        self._learnt = self._kept = 0
        self._known: dict[Any, Any] = {}  # a shape → a fork, pieces, or "unlike"

    def fill(self, value: Any) -> str | None:
        """The template's text for this value, if it is like one that was learnt."""
        if self._kept and (found := self._shape(value)):
            shape, holes = found
            longest = _longest(holes)
            return self._put_together(self._follow(shape, holes, longest), holes, longest)
        return None

    def is_new(self, value: Any) -> bool:
        """Whether nothing was learnt of values like this one, and there is time to learn it."""
        goes_on = self._learnt < MOST_LEARNT and self.seconds < MOST_SECONDS
        found = self._shape(value) if goes_on else None
        return found is not None and self._follow(*found, _longest(found[1])) is None

    def learn(self, value: Any, text: str, reply: str) -> None:
        """Take in a worker's reply ("": none) on this new value, which the template made `text`."""
        self._learnt += 1
        said = json.loads(reply) if reply else {"tests": [], "pieces": None}
        shape, holes = self._shape(value) or ((), [])
        leaf: Any = "unlike"
        if said["pieces"]:
            leaf = _Pieces(said["pieces"])
            is_same = self._put_together(leaf, holes, _longest(holes)) == text
            self._kept += leaf.kept if is_same else 0
            leaf = leaf if is_same and self._kept <= MOST_KEPT else "unlike"
        place, key = self._known, shape
        for piece, name, argument, outcome in said["tests"]:
            fork = place.setdefault(key, _Fork(piece, TESTS[name], argument, {}))
            if type(fork) is not _Fork:
                return
            place, key = fork.after, outcome
        place.setdefault(key, leaf)

    def _follow(self, shape: Shape, holes: list, longest: int) -> Any:
        node, work = self._known.get(shape), 0
        while type(node) is _Fork:
            work += longest * (1 + len(node.piece[1]))
            if work > MOST_WORK:
                return "unlike"
            try:
                node = node.after.get(node.test(derived(holes, node.piece), node.argument))
            except ValueError:  # a number of more digits than Python writes
                return "unlike"
        return node

    def _put_together(self, found: Any, holes: list, longest: int) -> str | None:
        if type(found) is not _Pieces:
            return None
        most = found.fixed + found.holes * (GROWTH * longest + DIGITS)
        if most > self.most or found.operations * longest > MOST_WORK:
            return None
        try:
            made = "".join([
                one if (kind := type(one)) is str else holes[one] if kind is int
                else derived(holes, one)
                for one in found.pieces
            ])  # fmt: skip
            if not made.isascii():
                made.encode()  # an error where it has half a surrogate pair
            return made
        except ValueError:
            return None


@dataclass
class _Fork:
    """A test, and what follows each outcome that was seen."""

    piece: Sequence
    test: Callable[[Any, Any], Any]
    argument: Any
    after: dict[Any, Any]


class _Pieces:
    """The pieces of a text (where a hole is shown as it is, its number), the characters that are
    in no hole, the number of holes, and of the operations on them."""

    def __init__(self, pieces: list[Any]) -> None:
        self.pieces: list[Any] = [p if type(p) is str or p[1] else p[0] for p in pieces]
        self.fixed = sum(len(piece) for piece in pieces if type(piece) is str)
        holes = [piece for piece in pieces if type(piece) is not str]
        self.holes, self.operations = len(holes), sum(len(hole[1]) for hole in holes)
        self.kept = len(pieces) + self.fixed


def _longest(holes: list) -> int:
    longest = 0
    for one in holes:
        if type(one) is str and len(one) > longest:
            longest = len(one)
    return longest
