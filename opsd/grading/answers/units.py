"""Parse units of measurement and money, with factors of conversion."""

from dataclasses import dataclass
from fractions import Fraction

from opsd.grading.answers.notation import FORM, NOTATION


@dataclass(frozen=True)
class Unit:
    """kind: what it measures, as sorted (kind, power). factor: its size in basic units of kind."""

    kind: tuple[tuple[str, int], ...]
    factor: Fraction = Fraction(1)


_UNITS: dict[str, Unit] = {}
for _kind, _entries in NOTATION["units"].items():
    _size, *_made_of = NOTATION["dimensions"].get(_kind, f"1|{_kind} 1").split("|")
    _kinds = tuple((_part[:-2].strip(), int(_part[-2:])) for _part in _made_of)
    for _entry in _entries.split("|"):
        _name, _factor, *_others = _entry.split()
        _one = Unit(_kinds, Fraction(_factor) * Fraction(_size))
        _UNITS |= dict.fromkeys((_name, *_others), _one)
for _name, _others in NOTATION["units_elsewhere"].items():
    _UNITS |= dict.fromkeys(_others.split(), _UNITS[_name])
_COMPOUND: dict[str, str] = NOTATION["units_compound"]


def _simple(word: str) -> Unit | None:
    lower = word.lower()
    if word in _UNITS:
        return _UNITS[word]
    for form in (lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if len(form) > 1 and form in _UNITS:
            return _UNITS[form]
    return None


def unit(text: str) -> Unit | None:
    """Parse a unit: `m/s^2`, `square inches`, `miles per hour`, `\\$`; None if it is unknown."""
    text = text.strip().replace("\\$", "$").replace("^\\circ", "°").replace("° ", "°").strip(" .")
    if not text or len(text) > 60:
        return None
    text = _COMPOUND.get(text.lower(), text)
    text = FORM.below.sub(lambda found: "/" + "/".join(FORM.apart.split(found[1].strip())), text)
    kinds: dict[str, int] = {}
    factor = Fraction(1)
    position, sign = 0, 1
    while position < len(text):
        found = FORM.factor.match(text, position)
        one = _simple(found[2]) if found else None
        if found is None or one is None:
            return None
        power = int(found[3] or found[5] or {"squared": 2, "cubed": 3}.get(found[4] or "", 1))
        power *= {"s": 2, "c": 3}.get((found[1] or " ")[0].lower(), 1)
        for kind, exponent in one.kind:
            kinds[kind] = kinds.get(kind, 0) + sign * power * exponent
        factor *= one.factor ** (sign * power)
        position = found.end()
        if position < len(text):
            joint = FORM.joint.match(text, position)
            if joint is None:
                return None
            sign = -1 if joint[1] in ("/", "per") else 1
            position = joint.end()
    return Unit(tuple(sorted((kind, power) for kind, power in kinds.items() if power)), factor)


DEGREES = Unit((("angle", 1),), Fraction(1))
RADIANS = Unit((("radian", 1),), Fraction(1))
