"""Compare expressions by math-verify, with corrections of its errors.

Only the grading process imports this module: its first call takes seconds.
"""

import logging
import math
import random
import re
import zlib
from dataclasses import replace
from functools import lru_cache, partial

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import LatexExtractionConfig, parse, parser, verify

from opsd.grading.answers.clean import plain_text, squeezed
from opsd.grading.answers.notation import FORM
from opsd.grading.answers.numbers import as_latex, number

_PARAMETERS = ("k", "n", "m", "l", "j", "t")
_POINTS = 12


def _infinite(value: object) -> bool:
    """Whether an expression contains an infinity. math-verify's comparison of it with a number is
    random: `|2.5\\infty|` equals 2.5 under some of Python's hash seeds."""
    return isinstance(value, sympy.Expr) and value.has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan)


def _differ_in_case(one: object, other: object) -> bool:
    """Whether the letters of two expressions differ only in case, which math-verify ignores in
    names of several letters."""
    names = [
        {s.name for s in side.free_symbols} if isinstance(side, sympy.Expr) else set()
        for side in (one, other)
    ]
    small = [{name.casefold() for name in some} for some in names]
    return names[0] != names[1] and small[0] == small[1]


class Algebra:
    """Compares two expressions, equations or sets, given as texts."""

    def __init__(self) -> None:
        logging.disable(logging.CRITICAL)
        self._read = lru_cache(maxsize=256)(self._parsed)  # a reference has many answers
        # Keep the case of letters: otherwise \\pi R^2 would be \\pi r^2, and \\frac{R}{r} be 1.
        own_case = ConversionConfig(lowercase_symbols=False)
        parser.latex2sympy = partial(latex2sympy, conversion_config=own_case)
        # Turn off `units`, which removes the c from `\frac{a}{b}c` and the bc from `3bc`.
        rules = replace(LatexExtractionConfig().normalization_config, units=False)
        latex = LatexExtractionConfig(boxed_match_priority=0, normalization_config=rules)
        self._forms = [latex]  # its other form takes any number from a text that it cannot read

    def __call__(self, wanted: str, given: str) -> bool:
        """Whether they are equal; the reference comes first, since math-verify is not symmetric."""
        wanted, given = _same_logarithm(wanted, given)
        crossed = FORM.crossed.search(wanted) and FORM.crossed.search(given)
        if crossed or FORM.transposed.search(wanted + given):  # math-verify exchanges the factors
            return re.sub(r"[\s{}]", "", wanted) == re.sub(r"[\s{}]", "", given)
        one, other = self._read(wanted), self._read(given)
        if not one or not other or _infinite(one[0]) != _infinite(other[0]):
            return False
        if _differ_in_case(one[0], other[0]):
            return False
        if any(_open_sums(side[0]) for side in (one, other)):
            return _same_sums(one[0], other[0])
        if any(_relations(side[0]) for side in (one, other)):
            sets = [_numbers(one[0], wanted), _numbers(other[0], given)]
            if None not in sets:
                return bool(sets[0] == sets[1])
        exact = "." not in wanted + given
        return self._equal(one, other, exact) or _same_elsewhere(one[0], other[0], exact)

    def between(self, text: str, low: str, high: str) -> bool:
        """Whether the constant `text` lies between `low` and `high`."""
        value = self._read(text)
        if not value or not isinstance(value[0], sympy.Expr) or not value[0].is_number:
            return False
        ends = [sympy.N(self._read(end)[0]) for end in (low, high)]
        return bool(ends[0] <= sympy.N(value[0]) <= ends[1])

    def _parsed(self, text: str) -> list:
        # math-verify's own time limits use SIGALRM, which cannot interrupt one long C call; the
        # parent's kill can.
        boxed = "\\boxed{" + _to_latex(text) + "}"
        read = parse(boxed, extraction_config=self._forms, parsing_timeout=None)
        for each in read[0].atoms(sympy.Derivative) if read and hasattr(read[0], "atoms") else ():
            if not each.expr.has(*each.variables):  # of a mere letter: sympy takes it as 0
                read[0] = read[0].subs(each, sympy.Symbol(str(each)))
        return read

    def _equal(self, wanted: list, given: list, exact: bool) -> bool:
        try:
            equal = verify(
                wanted,
                given,
                timeout_seconds=None,
                allow_set_relation_comp=True,
                raise_on_error=True,
            )
            return bool(equal) and _close(wanted[0], given[0], exact)
        except MemoryError:
            raise
        except Exception:
            # sympy can raise anything for nonsense; the last entry is the normalised text
            return bool(wanted) and wanted[-1] == given[-1]


def _to_latex(text: str) -> str:
    """`2*pi` -> `2*\\pi`: math-verify would read the word as a product of letters."""
    text = " ".join(text.split())  # thousands of spaces cost latex2sympy seconds
    text = re.sub(r"\\text\{ (or|and) \}", "\0\\1\0", text)
    text = plain_text(text).replace("\0or\0", "\\text{ or }").replace("\0and\0", "\\text{ and }")
    text = FORM.of_integration.sub(r"\1C", FORM.taken.sub(lambda found: _named(found[0]), text))
    text = FORM.bracketed.sub(r"\1\\cdot ", text)
    text = FORM.index_above.sub(r"_{0\1}", FORM.opaque.sub(_as_name, text))
    text = FORM.prime.sub(lambda found: f"_{{{len(found[0])}}}", text)
    text = FORM.bare_sqrt.sub(lambda found: f"\\sqrt{found[1] or ''}{{{found[2]}}}", text)
    if FORM.trigonometry.search(text):
        text = FORM.symbolic_degrees.sub(r"{(\\frac{\1\\pi}{180})}", text)
    text = text.replace("^\\circ", "")
    text = FORM.symbolic_scientific.sub(r"\1\\times10^{\2}", text)
    text = FORM.symbolic_repeating.sub(lambda found: as_latex(number(found[0]).value), text)
    return FORM.plain_command.sub(r"\\\1", text)


def _as_name(found: re.Match) -> str:
    """A name for `\\gcd(m,n)`, which sympy takes as 1, for `f(2x)` and `E[X^2]`, which it takes as
    products, for `f^{-1}(x)` and `n!!`; the same for the same arguments."""
    function, inside = (squeezed(group) for group in found.groups() if group)
    if inside == "!!" and function.isdecimal():
        return str(math.prod(range(int(function), 0, -2)))
    if not re.search("[A-Za-z!]", inside):
        return found[0]
    arguments = ",".join(sorted(inside.split(",")) if "c" in function else [inside])
    return _named(f"{function}({arguments})")


def _named(text: str) -> str:
    return f"u_{{{zlib.crc32(squeezed(text).encode())}}}"


def _same_logarithm(one: str, other: str) -> tuple[str, str]:
    """Both expressions with `\\ln` for `\\log` without a base if one has `\\ln`: math-verify takes
    such a `\\log` as the decimal logarithm."""
    if "\\ln" in one + other and FORM.bare_logarithm.search(one + other):
        return FORM.bare_logarithm.sub(r"\\ln", one), FORM.bare_logarithm.sub(r"\\ln", other)
    return one, other


def _close(one, other, exact: bool) -> bool:
    """Whether two constants that math-verify calls equal also are relative to their size: it rounds
    to six decimals, so that 1e-20 would equal 2e-20. True for all but constants.

    exact: neither has decimals.
    """
    constants = all(isinstance(side, sympy.Expr) and side.is_number for side in (one, other))
    if not constants or one == other:
        return True
    one, other = sympy.N(one, 30), sympy.N(other, 30)
    if not all(side.is_finite for side in (one, other)):
        return True
    tolerance = 1e-15 if exact else 1e-5
    return bool(abs(one - other) <= tolerance * max(abs(one), abs(other)))


def _relations(side) -> bool:
    """Whether it is several relations: math-verify reads `x<1 or x>2` like `x<1 and x>2`."""
    kinds = (sympy.core.relational.Relational, sympy.And)
    return isinstance(side, sympy.FiniteSet) and all(isinstance(one, kinds) for one in side)


def _numbers(side, text: str):
    """The set of numbers that a set, or relations of one unknown, describe; None for others."""
    side = sympy.nsimplify(side, rational=True) if isinstance(side, sympy.Basic) else side
    if not _relations(side):
        relation = isinstance(side, sympy.logic.boolalg.Boolean)
        return side.as_set() if relation else side if isinstance(side, sympy.Set) else None
    if len(side.free_symbols) != 1:
        return None
    sets = [one.as_set() for one in side]
    both = sympy.Intersection(*sets)
    if "\\text{ or }" in text or ("\\text{ and }" not in text and both.is_empty):
        return sympy.Union(*sets)  # a comma means `and` unless the intersection is empty
    return both


def _same_elsewhere(wanted, given, exact: bool) -> bool:
    """Whether both are equal at random points at which they are real, with `i` as the imaginary
    unit, and with one name for the integer in a periodic solution."""
    sides = [wanted, given]
    if not all(isinstance(side, sympy.Expr) for side in sides):
        return False
    same = {s: sympy.Symbol(s.name, real=True) for side in sides for s in side.free_symbols}
    units = {s: sympy.I for s in same if s.name == "i"}
    sides = [side.subs(same | units) for side in sides]
    symbols = [sorted(side.free_symbols, key=str) for side in sides]
    if symbols[0] != symbols[1]:
        names = [[s.name for s in some] for some in symbols]
        periodic = all(len(some) == 1 and some[0] in _PARAMETERS for some in names)
        if not periodic or not all(side.has(sympy.pi) for side in sides):
            return False
        sides[1] = sides[1].subs(symbols[1][0], symbols[0][0])
        symbols[1] = symbols[0]
    if not symbols[0]:
        size, difference = (sympy.N(value, 30) for value in (sides[0], sides[0] - sides[1]))
        if not difference.is_finite or abs(size) > 1e6 or (exact and not units):
            return False
        return bool(abs(difference) < (1e-25 if exact else 1e-13 * abs(size)))
    return _same_at_points(sides, symbols[0], 1e-18 if exact else 1e-12)


def _open_sums(side) -> bool:
    """Whether an expression has a sum or product with a name in its limits, such as n."""
    found = side.atoms(sympy.Sum, sympy.Product) if isinstance(side, sympy.Expr) else ()
    return any(end.free_symbols for each in found for _, *ends in each.limits for end in ends)


def _same_sums(*sides) -> bool:
    """Whether two expressions have one value for each of some small whole numbers."""
    names = [sorted(side.free_symbols, key=str) for side in sides if isinstance(side, sympy.Expr)]
    if len(names) < 2 or names[0] != names[1]:
        return False
    points = [{s: start + 2 * index for index, s in enumerate(names[0])} for start in range(1, 7)]
    values = [[sympy.N(side.subs(point).doit(), 30) for side in sides] for point in points]
    return all(abs(one - other) <= 1e-18 * max(1, abs(one)) for one, other in values)


def _roots(side) -> list:
    """The roots and logarithms in an expression, which may make it imaginary."""
    return [
        part
        for part in sympy.preorder_traversal(side)
        if (part.is_Pow and not part.exp.is_integer) or isinstance(part, sympy.log)
    ]


def _same_at_points(sides: list, symbols: list, tolerance: float) -> bool:
    draw = random.Random(len(str(sides)))
    seen = 0
    for index in range(_POINTS):
        point = {s: sympy.Rational(draw.randint(-4000, 4000), 997) for s in symbols}
        if index % 2:  # positive, so that roots and logarithms are real
            point = {s: abs(value) for s, value in point.items()}
        values = [sympy.N(side.subs(point), 30) for side in sides]
        imaginary = any(side.has(sympy.I) for side in sides)
        if not all((imaginary or value.is_real) and value.is_finite for value in values):
            continue
        if not all(sympy.N(root.subs(point)).is_real for side in sides for root in _roots(side)):
            continue
        seen += 1
        if abs(values[0] - values[1]) > tolerance * max(1, abs(values[0])):
            return False
    return seen > 2
