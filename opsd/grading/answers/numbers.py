"""Parse plain numbers exactly: integers, decimals, fractions, mixed numbers, powers of ten."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from opsd.grading.answers.notation import FORM

MOST_EXPONENT = 5000
ENOUGH_DECIMALS = 6

_SEPARATED = {",": FORM.by_commas, " ": FORM.by_spaces, "'": FORM.by_apostrophes}


@dataclass(frozen=True)
class Number:
    """A plain number. ulp: one unit in the last place of a decimal, None for an exact number.
    enough: it has enough digits to stand for an exact number."""

    value: Fraction
    ulp: Fraction | None = None
    enough: bool = False

    def __neg__(self) -> Number:
        return Number(-self.value, self.ulp, self.enough)


def said(found: re.Match) -> list[str]:
    """The groups of the alternative that matched."""
    return [group for group in found.groups() if group is not None]


def separators(text: str) -> str:
    """Remove separators of thousands and write a point for decimals; `1,23` keeps its comma."""
    for mark, pattern in _SEPARATED.items():
        if pattern.fullmatch(text):
            return text.replace(mark, "")
    if found := FORM.continental.fullmatch(text):
        whole, *decimals = said(found)
        return ".".join([whole.replace(".", "").replace(" ", ""), *decimals])
    return text


def decimal_comma(text: str) -> str | None:
    """`3,5` → 3.5; None if the comma is no decimal one, such as before three digits."""
    found = FORM.comma.fullmatch(text)
    return "{}{}.{}{}".format(*said(found)) if found else None


def number(text: str) -> Number | None:
    """Parse a plain number; None for anything else."""
    sign, text = _signed(text.strip())
    while (
        len(text) > 2 and text[0] + text[-1] in ("{}", "()") and not set("{}()") & set(text[1:-1])
    ):
        own, text = _signed(text[1:-1].strip())
        sign *= own
    if not text or not (text[0].isdecimal() or text[0] in ".\\{"):
        return None
    text = separators(text)
    for pattern, reader in _FORMS:
        if found := pattern.fullmatch(text):
            try:
                value = reader(*said(found))
            except (ValueError, ZeroDivisionError, OverflowError):
                return None
            return value if sign == 1 else -value
    return None


def _signed(text: str) -> tuple[int, str]:
    if text[:1] in ("+", "-"):
        return -1 if text[0] == "-" else 1, text[1:].lstrip()
    return 1, text


def _exponent(text: str) -> int:
    text = text.replace(" ", "")
    if len(text) > 6 or abs(int(text)) > MOST_EXPONENT:
        raise ValueError("too large")
    return int(text)


def _decimal(text: str, exponent: int) -> Number:
    whole, point, decimals = text.partition(".")
    value = Fraction(int((whole + decimals) or "0")) * Fraction(10) ** (exponent - len(decimals))
    if not point or not decimals:
        return Number(value)
    enough = len((whole + decimals).lstrip("0")) >= ENOUGH_DECIMALS and (
        len(decimals) >= ENOUGH_DECIMALS or exponent != 0
    )
    return Number(value, Fraction(10) ** (exponent - len(decimals)), enough)


def _quotient(above: str, below: str) -> Number:
    one, other = number(above), number(below)
    if one is None or other is None:
        raise ValueError("no number")
    return Number(one.value / other.value)


def _mixed(whole: int, above: int, below: int) -> Number:
    """1 1/2. Raises ValueError for `17\\frac{17}{1}`, which would hide a sum or a product."""
    if above >= below:
        raise ValueError("no mixed number")
    return Number(whole + Fraction(above, below))


def _repeating(whole: str, decimals: str, *digits: str) -> Number:
    """0.1\\overline{6} = (16 - 1) / 90."""
    start, period = whole + decimals, "".join(digits)
    above = int(start + period) - int(start or "0")
    return Number(Fraction(above, int("9" * len(period) + "0" * len(decimals))))


_FORMS: list[tuple[re.Pattern, Callable[..., Number]]] = [
    (FORM.decimal, lambda text: _decimal(text, 0)),
    (FORM.scientific, lambda text, exponent: _decimal(text, _exponent(exponent))),
    (FORM.power_of_ten, lambda exponent: Number(Fraction(10) ** _exponent(exponent))),
    *((form, _quotient) for form in (FORM.fraction, FORM.slashed, FORM.over)),
    (FORM.mixed_number, lambda *digits: _mixed(*map(int, digits))),
    (FORM.repeating, _repeating),
    (FORM.dotted, _repeating),
    (FORM.endless, _repeating),
]


def same_number(one: Number, other: Number) -> bool:
    """Whether the numbers are equal, or one is the other rounded to ENOUGH_DECIMALS or more."""
    if one.value == other.value:
        return True
    coarse = max(one.ulp or Fraction(0), other.ulp or Fraction(0))
    enough = all(n.enough for n in (one, other) if n.ulp == coarse)
    return abs(one.value - other.value) < coarse and enough


def as_latex(value: Fraction) -> str:
    """An exact fraction in LaTeX, for algebra."""
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
