"""Plain numbers, exactly: integers, decimals, fractions, mixed numbers, powers of ten."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MOST_EXPONENT = 5000
ENOUGH_DECIMALS = 6

_D = r"(?:\d+(?:\.\d*)?|\.\d+)"
_SIGNED = rf"[+-]?\s*{_D}"
_PLAIN = re.compile(rf"({_D})")
_POWER_OF_TEN = re.compile(
    rf"({_D})\s*(?:[eE]\s*([+-]?\d+)|(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{{\s*([+-]?\s*\d+)\s*\}}|(\d)))"
)
_TEN_POWER = re.compile(r"10\s*\^\s*(?:\{\s*([+-]?\s*\d+)\s*\}|(\d))")
_FRACTION = re.compile(
    rf"\\frac\s*(?:\{{\s*({_SIGNED})\s*\}}|(\d))\s*(?:\{{\s*({_SIGNED})\s*\}}|(\d))"
)
_SLASH = re.compile(rf"\{{?\s*({_D})\s*\}}?\s*/\s*(?:\{{\s*({_SIGNED})\s*\}}|({_D}))")
_OVER = re.compile(rf"({_D})\s*\\over\s*({_D})")
_MIXED = re.compile(
    r"(\d+)\s*(?:\\frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d)))|(\d+)\s+(\d+)\s*/\s*(\d+)"
)
_REPEATING = re.compile(
    r"(\d{0,30})\.(\d{0,30})(?:\\overline\s*\{\s*(\d{1,30})\s*\}|\((\d{1,30})\)|\\dot\s*\{?(\d)\}?)"
)
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d*)?")
_SPACED = re.compile(r"\d{1,3}(?: \d{3})+(?:\.\d*)?")
_SWISS = re.compile(r"\d{1,3}(?:'\d{3})+(?:\.\d*)?")
_CONTINENTAL = re.compile(
    r"(\d{1,3}(?:\.\d{3})+),(\d+)|(\d{1,3}(?:\.\d{3}){2,})|(\d{1,3}(?: \d{3})+),(\d+)"
)
_COMMA = re.compile(r"([+-]?)\s*(?:(\d+),(\d{1,2}|\d{4,})|(0),(\d+))((?![\d.])[^,]*)")


@dataclass(frozen=True)
class Number:
    """A plain number. `ulp`: one unit of the last place of a decimal, None for an exact number;
    `enough`: whether so many of its digits are given that it can stand for an exact number."""

    value: Fraction
    ulp: Fraction | None = None
    enough: bool = False

    def __neg__(self) -> Number:
        return Number(-self.value, self.ulp, self.enough)


def separators(text: str) -> str:
    """Digits without separators, with a point for decimals; `1,23` keeps its comma."""
    if _THOUSANDS.fullmatch(text):
        return text.replace(",", "")
    if _SPACED.fullmatch(text):
        return text.replace(" ", "")
    if _SWISS.fullmatch(text):
        return text.replace("'", "")
    if found := _CONTINENTAL.fullmatch(text):
        whole = (found[1] or found[3] or found[4]).replace(".", "").replace(" ", "")
        decimals = found[2] or found[5]
        return f"{whole}.{decimals}" if decimals else whole
    return text


def decimal_comma(text: str) -> str | None:
    """`3,5` as 3.5, where a comma can be a decimal one; three digits after it are thousands."""
    found = _COMMA.fullmatch(text)
    if found is None:
        return None
    sign, whole, decimals, zero, after_zero, rest = found.groups()
    return f"{sign}{whole or zero}.{decimals or after_zero}{rest}"


def number(text: str) -> Number | None:
    """The plain number that a text is, None for anything else."""
    text = text.strip()
    sign = 1
    if text[:1] in ("+", "-"):
        sign = -1 if text[0] == "-" else 1
        text = text[1:].lstrip()
    while (
        len(text) > 2 and text[0] + text[-1] in ("{}", "()") and not set("{}()") & set(text[1:-1])
    ):
        text = text[1:-1].strip()
        if text[:1] in ("+", "-"):
            sign *= -1 if text[0] == "-" else 1
            text = text[1:].lstrip()
    if not text or not (text[0].isdecimal() or text[0] in ".\\{"):
        return None
    found = _read(separators(text))
    return found if found is None or sign == 1 else -found


def _read(text: str) -> Number | None:
    try:
        if _PLAIN.fullmatch(text):
            return _decimal(text, 0)
        if found := _POWER_OF_TEN.fullmatch(text):
            return _decimal(found[1], _exponent(found[2] or found[3] or found[4]))
        if found := _TEN_POWER.fullmatch(text):
            return Number(Fraction(10) ** _exponent(found[1] or found[2]))
        if found := _FRACTION.fullmatch(text):
            return _quotient(found[1] or found[2], found[3] or found[4])
        if found := _SLASH.fullmatch(text):
            return _quotient(found[1], found[2] or found[3])
        if found := _OVER.fullmatch(text):
            return _quotient(found[1], found[2])
        if found := _MIXED.fullmatch(text):
            whole, above, below = (
                (found[1], found[2] or found[3], found[4] or found[5])
                if found[1]
                else found.groups()[5:]
            )
            part = Fraction(int(above), int(below))
            return Number(int(whole) + part)
        if found := _REPEATING.fullmatch(text):
            return _repeating(found[1] + found[2], len(found[2]), found[3] or found[4] or found[5])
    except (ValueError, ZeroDivisionError, OverflowError):
        pass
    return None


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


def _repeating(start: str, places: int, period: str) -> Number:
    """0.1\\overline{6} = (16 - 1) / 90."""
    above = int(start + period) - int(start or "0")
    return Number(Fraction(above, int("9" * len(period) + "0" * places)))


def same_number(one: Number, other: Number) -> bool:
    """Equal; or one is a decimal with six decimals or more, all of them right."""
    if one.value == other.value:
        return True
    difference = abs(one.value - other.value)
    coarse = [n.ulp for n in (one, other) if n.ulp is not None]
    return (
        bool(coarse)
        and difference < max(coarse)
        and all(n.enough for n in (one, other) if n.ulp == max(coarse))
    )


def as_latex(value: Fraction) -> str:
    """For algebra: an exact fraction."""
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
