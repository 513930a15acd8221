"""Parse digits in a base other than ten."""

from opsd.grading.answers.clean import plain_text, trim
from opsd.grading.answers.nodes import Based, Value
from opsd.grading.answers.notation import FORM, NOTATION
from opsd.grading.answers.numbers import number

_BASED, _NUMERALS = FORM.based, NOTATION["numerals"]


def based(text: str, depth: int = 0) -> Based | Value | None:
    """Parse `110_2`, `(52)_8` or `2A in base 16`; None for anything else."""
    if "_" not in text and "base" not in text:
        return None
    found = _BASED.fullmatch(trim(plain_text(text))) or _BASED.fullmatch(text)
    if found is None:
        return None
    digits, base = (found[1] or found[4]).upper(), found[2] or found[3] or found[5]
    base = int(base) if base.isdecimal() and len(base) < 3 else int(_NUMERALS.get(base, 0))
    try:
        value = int(digits, base) if 2 <= base <= 36 else None
    except ValueError:  # the base does not have these digits
        value = None
    if value is None or (not digits[0].isdecimal() and base <= 10):
        return None
    if base == 10:
        return Value(digits, number(digits))
    return Based(digits.lstrip("0") or "0", base, value)
