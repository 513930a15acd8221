"""Parse values with a unit, a currency, per cent, degrees, or the thing that is counted."""

import re
from fractions import Fraction
from itertools import pairwise

from opsd.grading.answers.clean import plain_text, trim
from opsd.grading.answers.nodes import Value
from opsd.grading.answers.notation import FORM
from opsd.grading.answers.numbers import Number, as_latex, number
from opsd.grading.answers.structure import balanced
from opsd.grading.answers.units import DEGREES, Unit, unit
from opsd.grading.answers.words import MULTIPLES, names_a_thing, spelled_out


def quantity(text: str) -> Value | None:
    """Parse a value with its unit; None if the text has another form."""
    if (found := FORM.money_first.fullmatch(text)) is not None:
        inner = quantity(found[4]) or Value(trim(found[4]), number(trim(found[4])))
        if inner.unit is None and not inner.percent:
            signed = found[1] + inner.text
            return Value(signed, number(signed), unit(found[3]), inner.noun)
    if text[:2].lstrip("\\")[:1] == "%":  # Turkish and Arabic: `%50`
        text = text.lstrip("\\%") + "\\%"
    ends = text.endswith(("\\%", "%", "t}", "t", "s}", "s"))
    if ends and (found := FORM.percent.fullmatch(text)):
        core = trim(found[1])
        return Value(core, number(core), percent=True) if core else None
    if (found := FORM.percent_of.fullmatch(text)) and names_a_thing(said := plain_text(found[2])):
        value = quantity(found[1])
        return value and Value(value.text, value.number, None, _stem(said.casefold()), True)
    if "mod" in text and (found := FORM.modulus.fullmatch(text)):
        core = trim(found[1])
        return Value(core, number(core), noun=f"mod {found[2]}")
    if "^\\circ" in text and (found := FORM.degrees.fullmatch(text)):
        return _degrees(found)
    return _with_tail(FORM.ohm.sub(r"\\text{\1Ω}", text))


def counted(text: str) -> Value | None:
    """Parse `twelve apples`: a number in words and the thing that it counts."""
    words = text.split()
    for end in range(min(len(words) - 1, 9), 0, -1):
        value = spelled_out(" ".join(words[:end])) if words[0].casefold() != "a" else None
        if value is not None:
            rest = " ".join(words[end:])
            return _said(as_latex(value), rest, bare=True, apart=True)
    return None


def compound(text: str) -> Value | None:
    """Parse a quantity in several units, larger ones first: `3 hours 30 minutes`, `5'10''`."""
    text = trim(plain_text(text))
    parts = FORM.counted.findall(text)
    if len(parts) < 2 or FORM.counted.sub("", text):
        return None
    units = [unit({"'": "ft", "''": "in", '"': "in"}.get(name, name)) for _, name in parts]
    if None in units or any(
        one.kind != other.kind or one.factor <= other.factor for one, other in pairwise(units)
    ):
        return None
    sizes = [number(count).value * of.factor for (count, _), of in zip(parts, units, strict=True)]
    whole = all("." not in count for count, _ in parts[:-1])
    carries = any(n >= of.factor for n, of in zip(sizes[1:], units, strict=False))
    return _added([size / units[0].factor for size in sizes], units[0], carries or not whole)


def _added(parts: list[Fraction], of: Unit, carries: bool) -> Value:
    """Add parts given in the unit `of`. carries: keep a sum, as for `6 hours 60 minutes`."""
    if carries:
        return Value("+".join(map(as_latex, parts)), None, of)
    total = sum(parts, Fraction(0))
    return Value(as_latex(total), Number(total), of)


def short(value: Value, like: Unit | None) -> Value:
    """Read `30s` and `9.8 m/s^2` as quantities, though they may also be products. like: the other
    side's unit; K alone is a thousand unless that is kelvin."""
    if value.number is not None or not (found := FORM.short.fullmatch(value.text)):
        return value
    of = unit(FORM.quotient.sub(r"\1/\2", found[2]))
    if of is None or (found[2] == "K" and like != of):
        return value
    return Value(found[1], number(found[1]), of)


def times(value: Value, factor: Fraction) -> Value:
    """The value multiplied by a factor."""
    if value.number is not None:
        exact = value.number.value * factor
        return Value(as_latex(exact), Number(exact), value.unit, value.noun)
    return Value(f"{as_latex(factor)} \\cdot ({value.text})", None, value.unit, value.noun)


def _degrees(found: re.Match) -> Value | None:
    core = trim(found[1])
    if not core or FORM.trigonometry.search(core) or not balanced(core) or "^\\circ" in core:
        return None
    value = number(core)
    if found[2] is not None:
        if value is None:
            return None
        minutes, seconds = (number(part or "0").value for part in found.groups()[1:])
        if core.startswith("-"):
            minutes, seconds = -minutes, -seconds
        parts = [value.value, minutes / 60, seconds / 3600]
        return _added(parts, DEGREES, max(abs(minutes), abs(seconds)) >= 60)
    return Value(core, value, DEGREES)


def _with_tail(text: str) -> Value | None:
    if (found := FORM.tail.fullmatch(text)) is None:
        return None
    core, tail = trim(found["core"]), found["tail"]
    if not core or not balanced(core) or "\\text" in core:
        return None
    said = re.sub(r"\\text\s*", "", trim(plain_text(tail)))
    apart = text[len(found["core"]) :][:1] == " "
    return _said(core, said, bare=found["plain"] is not None, apart=apart)


def _said(core: str, said: str, bare: bool, apart: bool) -> Value | None:
    """`core` followed by words or signs, `said`. bare: not in `\\text{}`. apart: after a space."""
    first, _, others = said.partition(" ")
    if first.lower() in MULTIPLES or first[:1] in MULTIPLES:
        factor = MULTIPLES.get(first.lower()) or MULTIPLES.get(first[:1])
        plain = number(core)
        if factor is None or plain is None:
            return None
        exact = Number(plain.value * factor)
        rest = others if first.lower() in MULTIPLES else said[1:]
        rest = re.sub(r"^of\s+", "", rest.strip())
        if rest and unit(rest) is None and not names_a_thing(rest):
            return None
        return Value(as_latex(exact.value), exact, unit(rest) if rest else None)
    if FORM.units_of_the_page.fullmatch(said):
        return Value(core, number(core), noun="unit")
    of = unit(said)
    if of is not None and (not bare or len(first) > 1 or "^{-" in said or not first.isascii()):
        return Value(core, number(core), of)
    if bare:
        if FORM.function.match(said) or (first.isascii() and (len(first) < 3 or not apart)):
            return None
    if not names_a_thing(said):
        return None
    noun = re.sub(r"\(.*?\)", "", said).strip().casefold()
    return Value(core, number(core), noun=_stem(noun))


def _stem(noun: str) -> str:
    noun = " ".join(
        word for word in noun.split() if word not in ("different", "total", "the", "of", "in")
    )
    return noun[:-1] if noun.endswith("s") and len(noun) > 3 else noun
