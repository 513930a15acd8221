"""Units of measurement and money, with what one of them is in others of its kind."""

# ruff: noqa: RUF001 - characters that look alike are what this is about
from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Unit:
    """`kind`: what it measures, (kind, power) sorted; `factor`: its size in units of that kind."""

    kind: tuple[tuple[str, int], ...]
    factor: Fraction = Fraction(1)


_KINDS = {
    "length": "m 1 meter metre|mm .001 millimeter millimetre|cm .01 centimeter centimetre|dm .1 "
    "decimeter decimetre|km 1000 kilometer kilometre|μm .000001 micrometer um|nm 1e-9 nanometer|"
    "in .0254 inch inches|ft .3048 foot feet|yd .9144 yard|mi 1609.344 mile",
    "time": "s 1 second sec|ms .001 millisecond|min 60 minute|h 3600 hour hr|day 86400 d|"
    "week 604800",
    "month": "month 1|year 12 yr",
    "mass": "g 1 gram gm|mg .001 milligram|kg 1000 kilogram|t 1000000 tonne|lb 453.59237 pound|"
    "oz 28.349523125 ounce",
    "volume": "L 1 l liter litre|mL .001 ml milliliter millilitre|gallon 3.785411784 gal|"
    "quart .946352946|pint .473176473|cup .2365882365",
    "money": "$ 1 dollar buck usd|cent .01 ¢",
    "euro": "€ 1 euro eur",
    "pound sterling": "£ 1 gbp",
    "yuan": "元 1 ¥ yuan rmb 块",
    "rupee": "₹ 1 rupee",
    "angle": "° 1 degree deg",
    "radian": "rad 1 radian",
    "temperature C": "°C 1 celsius",
    "temperature F": "°F 1 fahrenheit",
    "force": "N 1 newton|kN 1000",
    "energy": "J 1 joule|kJ 1000 kilojoule|eV 1.602176634e-19|kWh 3600000",
    "power": "W 1 watt|kW 1000 kilowatt|MW 1000000 megawatt",
    "pressure": "Pa 1 pascal|kPa 1000",
    "voltage": "V 1 volt",
    "current": "A 1 ampere amp",
    "resistance": "Ω 1 ohm",
    "frequency": "Hz 1 hertz|kHz 1000|MHz 1000000",
    "substance": "mol 1 mole",
    "kelvin": "K 1 kelvin",
    "data": "byte 1 bytes|bit .125|KB 1000 kilobyte|MB 1000000 megabyte|GB 1000000000 gigabyte",
}
_UNITS: dict[str, Unit] = {}
for _kind, _entries in _KINDS.items():
    for _entry in _entries.split("|"):
        _name, _factor, *_others = _entry.split()
        for _word in (_name, *_others):
            _UNITS[_word] = Unit(((_kind, 1),), Fraction(_factor))
_OTHER_SCRIPTS = dict(
    pair.split(":")
    for pair in (
        "厘米:cm 毫米:mm 千米:km 公里:km 米:m 千克:kg 公斤:kg 克:g 秒:s 分钟:min 小时:h "
        "時間:h 天:day 度:° 美元:$ 欧元:€ км:km см:cm мм:mm м:m кг:kg г:g ч:h мин:min с:s"
    ).split()
)
_COMPOUND = {"mph": "mile / hour", "kph": "km / h", "kmh": "km / h", "rpm": "revolution / min"}
_FACTOR = re.compile(
    r"(?:(square|sq|cubic|cu)\b\.?)?\s*([^\W\d_]+|°C?F?|[$€£¥₹¢])\.?"
    r"(?:\s*\^\s*\{?\s*(-?\d)\s*\}?|\s*(squared|cubed)|([23])(?!\d))?",
)
_JOINT = re.compile(r"\s*(/|\bper\b|\\cdot|\*|-|\b(?=\s)|\s)\s*")


def _simple(word: str) -> Unit | None:
    word = _OTHER_SCRIPTS.get(word, word)
    if word in _UNITS:
        return _UNITS[word]
    lower = word.lower()
    for form in (lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if len(form) > 1 and form in _UNITS:
            return _UNITS[form]
    return None


def unit(text: str) -> Unit | None:
    """`m/s^2`, `square inches`, `miles per hour`, `\\$`: the unit, None where it is not known."""
    text = text.strip().replace("\\$", "$").replace("^\\circ", "°").replace("° ", "°").strip(" .")
    if not text or len(text) > 60:
        return None
    text = _COMPOUND.get(text.lower(), text)
    kinds: dict[str, int] = {}
    factor = Fraction(1)
    position, sign = 0, 1
    while position < len(text):
        found = _FACTOR.match(text, position)
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
            joint = _JOINT.match(text, position)
            if joint is None:
                return None
            sign = -1 if joint[1] in ("/", "per") else 1
            position = joint.end()
    return Unit(tuple(sorted((kind, power) for kind, power in kinds.items() if power)), factor)


DEGREES = Unit((("angle", 1),), Fraction(1))
