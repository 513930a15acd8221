"""The rules that decide whether an answer means the same as its reference.

The reference comes first everywhere. An answer may leave out what the reference leaves out, and
must not contradict it. `algebra(reference, given)` compares two expressions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, cast

from opsd.grading.answers import renamed
from opsd.grading.answers import strict as strictness
from opsd.grading.answers.clean import clean, plain_text, squeezed
from opsd.grading.answers.nodes import (
    Based,
    Choice,
    Equal,
    Grid,
    Items,
    Node,
    Phrase,
    Ratio,
    Relation,
    Unclear,
    Value,
    by_name,
    names_of,
)  # fmt: skip
from opsd.grading.answers.notation import FORM
from opsd.grading.answers.numbers import Number, as_latex, decimal_comma, same_number
from opsd.grading.answers.quantities import short, times
from opsd.grading.answers.read import has_symbol, interval, read
from opsd.grading.answers.units import DEGREES, RADIANS
from opsd.grading.answers.words import opposite

if TYPE_CHECKING:  # it loads sympy
    from opsd.grading.answers.symbolic import Algebra

_INTERVALS = ("()", "[]", "[)", "(]")


def compare(reference: str, given: str, algebra: Algebra, strict: bool = True) -> tuple[bool, str]:
    """(whether the given answer means the same as the reference, why)."""
    one, other = renamed.with_one_index(clean(reference)), renamed.with_one_index(clean(given))
    other = renamed.with_constants(one, renamed.with_names(one, other))
    one, other = renamed.without_domain(other, one), renamed.without_domain(one, other)
    one, other = renamed.with_sets_in_order(one), renamed.with_sets_in_order(other)
    if squeezed(one) == squeezed(other) != "":
        return True, "the same text"
    if (formula := renamed.chemical(one)) and formula == renamed.chemical(other):
        return True, "the same formula"
    domains = {frozenset(said) for side in (one, other) if (said := FORM.domains.findall(side))}
    if len(domains) > 1:
        return False, "another domain than the reference has"
    wanted, answer = read(one), read(other)
    if isinstance(answer, Unclear) and not isinstance(wanted, Unclear):
        return False, f"not understood: {answer.why}"
    comparison = _Comparison(algebra, strict)
    if comparison.same(wanted, answer):
        return True, "equal"
    if ";" in one + other and FORM.decimal_comma.search(one + other):  # `(0,5; 1,5)`
        points = [FORM.decimal_comma.sub(".", s) if ";" in s else s for s in (one, other)]
        if points != [one, other]:
            return compare(points[0], points[1], algebra, strict)
    return False, comparison.reason or "different"


class _Comparison:
    """Compares nodes. reason: why they differ, if a rule has said so; else ""."""

    def __init__(self, algebra: Algebra, strict: bool):
        self.algebra, self.strict = algebra, strict
        self.reason = ""

    def _algebra(self, wanted: str, given: str) -> bool:
        if self.strict and strictness.states_the_problem(wanted, given):
            return self._no(strictness.SUM)
        return self.algebra(wanted, given)

    def _no(self, reason: str) -> bool:
        self.reason = self.reason or reason
        return False

    def same(self, wanted: Node, given: Node) -> bool:
        """Whether `given` means the same as `wanted`."""
        if isinstance(wanted, Unclear) or isinstance(given, Unclear):
            if not (isinstance(wanted, Unclear) and isinstance(given, Unclear)):
                return False
            return squeezed(wanted.text).casefold() == squeezed(given.text).casefold()
        if isinstance(wanted, Choice) or isinstance(given, Choice):
            return self._choices(wanted, given)
        if isinstance(wanted, Equal) or isinstance(given, Equal):
            if not (isinstance(wanted, Items) or isinstance(given, Items)):
                return self._equations(wanted, given)
        if isinstance(wanted, Items) or isinstance(given, Items):
            return self._several(wanted, given)
        if isinstance(wanted, Grid) and isinstance(given, Grid):
            return self._grids(wanted, given)
        if isinstance(wanted, Ratio) or isinstance(given, Ratio):
            return self._ratios(wanted, given)
        if isinstance(wanted, Based) or isinstance(given, Based):
            return self._based(wanted, given)
        if isinstance(wanted, Phrase) or isinstance(given, Phrase):
            return wanted == given
        if isinstance(wanted, Relation) or isinstance(given, Relation):
            return self._relations(wanted, given)
        if isinstance(wanted, Value) and isinstance(given, Value):
            return self._values(wanted, given)
        return False

    # --- choices and names ----------------------------------------------------------------------

    def _choices(self, wanted: Node, given: Node) -> bool:
        if isinstance(wanted, Choice) and isinstance(given, Choice):
            if wanted.rest is None or given.rest is None:
                return wanted.letter == given.letter
            return wanted.letter == given.letter and self.same(wanted.rest, given.rest)
        if isinstance(wanted, Choice):
            if isinstance(given, Value) and given.text.upper() == wanted.letter:
                return True
            if isinstance(given, Equal) and given.simple and isinstance(given.values[-1], Choice):
                return self.same(wanted, given.values[-1])
            return wanted.rest is not None and self.same(wanted.rest, given)
        if isinstance(wanted, Equal):
            return wanted.simple and self.same(wanted.values[-1], given)
        rest = given.rest if isinstance(given, Choice) else None
        return rest is not None and self.same(wanted, rest)

    def _equations(self, wanted: Node, given: Node) -> bool:
        if isinstance(given, Equal) and self._contradicts_itself(given):
            return self._no("an equation that contradicts itself")
        if isinstance(wanted, Equal) and isinstance(given, Equal):
            return self._both_equal(wanted, given)
        if isinstance(wanted, Equal):
            if isinstance(given, Relation):
                return given.equation and self._algebra(wanted.text, given.text)
            return wanted.simple and self._any(wanted.values, (given,))
        assert isinstance(given, Equal)
        if isinstance(wanted, Relation) and wanted.equation:
            return self._algebra(wanted.text, given.text)
        if not given.simple and _is_to_be_solved(given.name or ""):
            return self._no("an equation that is left to be solved")
        return self._any((wanted,), given.values)

    def _both_equal(self, wanted: Equal, given: Equal) -> bool:
        if not wanted.simple or not given.simple:
            return self._algebra(wanted.text, given.text)
        names = {wanted.name or "", given.name or ""}
        nouns = [getattr(side.values[-1], "noun", "") for side in (wanted, given)]
        if nouns[0].startswith("mod ") != nouns[1].startswith("mod "):
            return self._no("another modulus than the reference has")
        function = "y" in names and any(name.endswith("(x)") for name in names)
        of_one = FORM.of_one.sub("", max(names)) in names - {max(names)}
        alike = len(names) == 1 or "" in names or function or of_one
        if alike or renamed.may_name_the_same(wanted, given):
            if self._any(wanted.values, given.values):
                return True
        symbolic = any(_symbolic(side.values[-1]) for side in (wanted, given))
        return symbolic and wanted.name != given.name and self._algebra(wanted.text, given.text)

    def _any(self, wanted: tuple[Node, ...], given: tuple[Node, ...]) -> bool:
        """Whether any two values of two true chains are the same, trying the last ones first."""
        return any(self.same(one, other) for one in wanted[::-1] for other in given[::-1])

    def _contradicts_itself(self, chain: Equal) -> bool:
        lenient = _Comparison(self.algebra, strict=False)
        for index in range(1, len(chain.values)):
            one, other = chain.values[index - 1 : index + 1]
            if chain.approximate[index]:
                if not _near(one, other, self.algebra):
                    return True
            elif _letters(one) == _letters(other) and not lenient.same(one, other):
                return True
        return False

    # --- several --------------------------------------------------------------------------------

    def _several(self, wanted: Node, given: Node) -> bool:
        if isinstance(wanted, Items) and isinstance(given, Items):
            return self._items(wanted, given)
        if isinstance(wanted, Items):
            return self._items_and_one(wanted, given)
        assert isinstance(given, Items)
        return self._one_and_items(wanted, given)

    def _items_and_one(self, wanted: Items, given: Node) -> bool:
        if isinstance(given, Relation) and wanted.text:
            if own := interval(given.text):
                return self.same(wanted, own[1])
            return _is_set_of(wanted, given) and self._related(wanted.text, given.text)
        if isinstance(given, Grid) and wanted.kind in ("()", "[]"):
            return self._in_order(wanted.parts, _vector(given))
        if isinstance(given, Equal):
            if self._contradicts_itself(given):
                return self._no("an equation that contradicts itself")
            return self._any((wanted,), given.values)
        if isinstance(given, Value | Choice | Phrase) and (letters := _choices(wanted)):
            return letters == getattr(given, "text", "").upper()
        if isinstance(given, Value) and "," in given.text and wanted.kind == "list":
            return squeezed(wanted.text) == given.text  # `123,456` for 123 and 456
        if wanted.text.startswith("0,") and (point := decimal_comma(wanted.text)):
            return self.same(read(point), given)
        return wanted.kind == "set" and len(wanted.parts) == 1 and self.same(wanted.parts[0], given)

    def _one_and_items(self, wanted: Node, given: Items) -> bool:
        if isinstance(wanted, Relation) and given.text:
            if given.kind == "list" and "\\cup" in wanted.text:
                intervals = [part for part in given.parts if isinstance(part, Items)]
                parts = [one.text for one in intervals if one.kind in _INTERVALS]
                union = " \\cup ".join(parts)
                return len(parts) == len(given.parts) and self._related(wanted.text, union)
            if own := interval(wanted.text):
                return self.same(own[1], given)
            return _is_set_of(given, wanted) and self._related(wanted.text, given.text)
        if isinstance(wanted, Grid) and given.kind in ("()", "[]"):
            return self._in_order(_vector(wanted), given.parts)
        if isinstance(wanted, Equal):
            return wanted.simple and self._any(wanted.values, (given,))
        if given.kind == "set" and len(given.parts) == 1:
            return self.same(wanted, given.parts[0])
        if isinstance(wanted, Value | Phrase) and (letters := _choices(given)):
            return letters == wanted.text.upper()
        if _one_value(given):
            return self.same(wanted, given.parts[0])
        if isinstance(wanted, Value) and given.kind == "list" and wanted.number is not None:
            if "," in wanted.text:
                return squeezed(given.text) == wanted.text
            if wanted.number.value.denominator != 1 and (point := decimal_comma(given.text)):
                return self.same(wanted, read(point))
        return self._no("more answers than the reference has")

    def _items(self, wanted: Items, given: Items) -> bool:
        one, other = wanted.kind, given.kind
        unordered = {"list", "set", "then"}
        if one == "set" and other == "set":
            kinds = [[getattr(p, "kind", "") for p in side.parts] for side in (wanted, given)]
            if kinds[0].count("set") != kinds[1].count("set"):
                return self._no("a set in place of its element")
            return self._matched(self._distinct(wanted.parts), self._distinct(given.parts))
        if {"then"} != {one, other} <= unordered:
            if len(wanted.parts) != len(given.parts):
                return self._no("another number of answers than the reference has")
            said = plain_text(f"{wanted.text},{given.text}")
            both = FORM.said_and.search(said) and FORM.said_or.search(said)
            if both and not re.search(r"[\d\\]", said):
                return self._no("`and` for `or`")
            return self._lists(wanted.parts, given.parts)
        if one == "list" and other == "()" and names_of(wanted.parts):
            in_order = getattr(wanted.parts[0], "text", "").startswith("(")  # `(q,p) = (7,2)`
            parts = wanted.parts if in_order else by_name(wanted.parts)
            return self._in_order(parts, given.parts)
        if one == "()" and other == "list" and not FORM.said_or.search(given.text):
            return self._in_order(wanted.parts, by_name(given.parts))
        if one != other:
            return self._no("other brackets than the reference has")
        return self._in_order(wanted.parts, given.parts)

    def _lists(self, wanted: tuple[Node, ...], given: tuple[Node, ...]) -> bool:
        names, others = names_of(wanted), names_of(given)
        if names and others:
            known = dict(zip(others, given, strict=True))
            return set(names) == set(others) and all(
                self.same(part, known[name]) for name, part in zip(names, wanted, strict=True)
            )
        if names and len(root := {name.partition("_")[0] for name in names}) == 1:
            if all(isinstance(part, Equal) and {part.name} == root for part in given):
                values = [[cast(Equal, p).values[-1] for p in side] for side in (wanted, given)]
                return self._matched(*values)  # `x=1` or `x=-3` for `x_1=-3, x_2=1`
        if names:  # an answer without names must keep their order
            return self._in_order(wanted, given)
        return self._matched(wanted, given)

    def _in_order(self, wanted: Sequence[Node], given: Sequence[Node]) -> bool:
        return len(wanted) == len(given) and all(map(self.same, wanted, given))

    def _matched(self, wanted: Sequence[Node], given: Sequence[Node]) -> bool:
        if len(wanted) != len(given):
            return False
        left = list(given)
        for part in wanted:
            index = next((i for i, other in enumerate(left) if self.same(part, other)), None)
            if index is None:
                return False
            del left[index]
        return True

    def _distinct(self, parts: tuple[Node, ...]) -> list[Node]:
        kept: list[Node] = []
        for part in parts:
            if not any(self.same(other, part) for other in kept):
                kept.append(part)
        return kept

    def _grids(self, wanted: Grid, given: Grid) -> bool:
        if wanted.cases or given.cases:
            if wanted.cases != given.cases or len(wanted.rows) != len(given.rows):
                return False
            left = list(given.rows)
            for row in wanted.rows:
                match = next((other for other in left if self._in_order(row, other)), None)
                if match is None:
                    return False
                left.remove(match)
            return True
        return len(wanted.rows) == len(given.rows) and all(
            map(self._in_order, wanted.rows, given.rows)
        )

    # --- single ---------------------------------------------------------------------------------

    def _ratios(self, wanted: Node, given: Node) -> bool:
        if not (isinstance(wanted, Ratio) and isinstance(given, Ratio)):
            ratio, value = (wanted, given) if isinstance(wanted, Ratio) else (given, wanted)
            assert isinstance(ratio, Ratio)
            if ratio.half or len(ratio.parts) != 2 or ratio.parts[1].value == 0:
                return False
            if not isinstance(value, Value) or value.number is None or value.unit or value.percent:
                return False
            return ratio.parts[0].value / ratio.parts[1].value == value.number.value
        one, other = [part.value for part in wanted.parts], [part.value for part in given.parts]
        if wanted.sure != given.sure:
            if given.sure or not wanted.half:
                return self._no("another half of the day")
            one[0], other[0] = one[0] % 12, other[0] % 12  # only the reference says am or pm
        if one == other:
            return True
        if (wanted.clock and given.clock) or len(one) != len(other) or 0 in one or 0 in other:
            return False
        return all(a * other[0] == b * one[0] for a, b in zip(one, other, strict=True))

    def _based(self, wanted: Node, given: Node) -> bool:
        if isinstance(wanted, Based) and isinstance(given, Based):
            if wanted.base == given.base:
                return wanted.digits == given.digits
            return not self.strict and wanted.value == given.value
        if isinstance(wanted, Based):
            if _worth(given) != wanted.value:
                return False
            return not self.strict or self._no(strictness.BASE)
        return isinstance(given, Based) and _worth(wanted) == given.value

    def _relations(self, wanted: Node, given: Node) -> bool:
        if not isinstance(given, Relation) or not isinstance(wanted, Relation):
            return False
        if wanted.equation != given.equation:
            return False
        one, other = interval(wanted.text), interval(given.text)
        if one and other and one[0] == other[0]:
            return self.same(one[1], other[1])
        return self._related(wanted.text, given.text)

    def _related(self, wanted: str, given: str) -> bool:
        sums = strictness.has_sum_of_numbers(given) and not strictness.has_sum_of_numbers(wanted)
        if self.strict and sums and "=" not in given:
            return self._no(strictness.SUM)
        if self.strict and strictness.is_left_to_be_solved(wanted, given):
            return self._no(strictness.UNSOLVED)
        turned = FORM.mutual.sub(r"\3\\\2 \1", given)
        return squeezed(wanted) in map(squeezed, (given, turned)) or self._algebra(wanted, given)

    def _values(self, wanted: Value, given: Value) -> bool:
        wanted = short(wanted, given.unit) if given.unit else wanted
        given = given if wanted.number is None else short(given, wanted.unit)
        if opposite(wanted.noun, given.noun):
            return self._no("the opposite of what the reference says")
        if (wanted.unit == DEGREES) != (given.unit == DEGREES):
            bare = given if wanted.unit == DEGREES else wanted
            if bare.unit == RADIANS or (bare.unit is None and "\\pi" in bare.text):
                wanted, given = (
                    Value(f"({side.text})\\cdot\\frac{{\\pi}}{{180}}")
                    if side.unit == DEGREES
                    else Value(side.text, side.number)
                    for side in (wanted, given)
                )
        if wanted.unit and given.unit and wanted.unit.kind != given.unit.kind:
            return self._no("another unit than the reference has")
        moduli = {side.noun for side in (wanted, given) if side.noun.startswith("mod ")}
        alone = wanted.noun != given.noun and None in (wanted.number, given.number)
        if len(moduli) > 1 or (moduli and alone):  # `a` is not `a \\bmod b`
            return self._no("another modulus than the reference has")
        if wanted.unit and given.unit and wanted.unit.factor != given.unit.factor:
            given = times(given, given.unit.factor / wanted.unit.factor)
        if wanted.percent != given.percent and self._as_hundredths(wanted, given):
            return True
        if wanted.number is not None and given.number is not None:
            return same_number(wanted.number, given.number)
        if self.strict:
            if wanted.number is not None and strictness.has_sum(given.text):
                return self._no(strictness.SUM)
            if strictness.adds_constants(wanted.text, given.text) and not has_symbol(wanted.text):
                return self._no(strictness.SUM)
        if squeezed(wanted.text) == squeezed(given.text):
            return True
        points = [renamed.points(side.text) for side in (wanted, given)]
        if all(points):
            return points[0] == points[1] or self._no("other points, or in another order")
        return self._algebra(_expression(wanted), _expression(given)) or self._rounded(
            wanted, given
        )

    def _rounded(self, wanted: Value, given: Value) -> bool:
        """Whether one is the other's rounded value, with enough digits: `3.14159265` for pi."""
        decimal, other = (wanted, given) if wanted.number is not None else (given, wanted)
        plain = decimal.number
        if plain is None or not plain.enough or other.number is not None:
            return False
        ends = (as_latex(plain.value - plain.ulp), as_latex(plain.value + plain.ulp))
        return self.algebra.between(other.text, *ends)

    def _as_hundredths(self, wanted: Value, given: Value) -> bool:
        """Whether a percentage equals the other value: `35\\%` is 0.35, but `3500\\%` is not 35."""
        percent, bare = (wanted, given) if wanted.percent else (given, wanted)
        if percent.number is None or bare.number is None:
            return False
        usual = bare.number.value <= 1 or bare.number.value.denominator != 1
        plain = percent.number
        ulp = None if plain.ulp is None else plain.ulp / 100
        hundredths = Number(plain.value / 100, ulp, plain.enough)
        return usual and same_number(hundredths, bare.number)


def _worth(node: Node) -> Fraction | None:
    return node.number.value if isinstance(node, Value) and node.number is not None else None


def _expression(value: Value) -> str:
    return value.text if value.number is None else as_latex(value.number.value)


def _is_set_of(items: Items, relation: Relation) -> bool:
    """Whether the items may be an interval or a set that the relation describes."""
    by_parts = re.search(r"\\(?:cup|cap|setminus)(?![A-Za-z])", relation.text)
    return items.kind in _INTERVALS or (items.kind == "set" and by_parts is not None)


def _choices(items: Items) -> str:
    """The sorted letters of several choices, `AC` for `A, C`; "" unless all are choices."""
    letters = [part.letter for part in items.parts if isinstance(part, Choice)]
    return "".join(sorted(letters)) if len(letters) == len(items.parts) else ""


def _one_value(items: Items) -> bool:
    """Whether items are one value with several names, `a = b = 30`, unlike `(a, b) = (30, 30)`."""
    texts = {part.text for part in items.parts if isinstance(part, Equal)}
    return len(texts) == 1 and texts.pop().count("=") == len(items.parts)


def _vector(grid: Grid) -> list[Node]:
    """The entries of a row or a column; of another matrix its rows, each as a list in brackets."""
    if len(grid.rows) == 1 or all(len(row) == 1 for row in grid.rows):
        return [cell for row in grid.rows for cell in row]
    return [Items("[]", row) for row in grid.rows]


def _is_to_be_solved(lhs: str) -> bool:
    """Whether `lhs = number` is an equation for one unknown: `2x`, `x+1`; not `m+n`, `x^2`."""
    bare = re.sub(r"[_^]\s*(?:\{[^{}]*\}|\w)", "", lhs)
    unknown = set(re.findall(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])", bare))
    return bool(re.search(r"\d", bare)) and len(unknown) <= 1


def _letters(node: Node) -> frozenset[str]:
    text = re.sub(r"\\[A-Za-z]+", " ", getattr(node, "text", ""))
    return frozenset(re.findall(r"[A-Za-z]", text)) - {"e", "i"}


def _symbolic(node: Node) -> bool:
    return isinstance(node, Value) and node.number is None and has_symbol(node.text)


def _near(one: Node, other: Node, algebra: Algebra) -> bool:
    """Whether `other` is `one` rounded, or cut, to the number of digits that `other` has."""
    if not (isinstance(one, Value) and isinstance(other, Value) and other.number is not None):
        return False
    shown, ulp = other.number.value, other.number.ulp or Fraction(1)
    low, high = (shown - ulp, shown + ulp / 2) if shown < 0 else (shown - ulp / 2, shown + ulp)
    if one.number is not None:
        return low <= one.number.value <= high and abs(one.number.value - shown) < ulp
    return algebra.between(one.text, as_latex(low), as_latex(high))
