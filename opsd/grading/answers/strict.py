r"""What equals the reference and earns nothing, because the work is left to the reader.

A policy that is paid for equal values soon writes the problem's own numbers into the box:
`17 + 25 - 8` where the reference is 34. So, with `loss.reward.strict` (the default):

1. *Sums.* Where the reference is a plain number (an integer, a decimal, a fraction, a percentage,
   with or without a unit), an answer with a sum or a difference in it earns nothing, wherever in
   the answer it stands: `\frac{30+4}{1}`, `\sqrt{9+16}`, `17\frac{17}{1}`. Nor does a limit, an
   integral, a maximum or a determinant: that is the problem, not its answer. Products, powers,
   factorials, roots, binomials, logarithms and fractions count, since people leave them on
   purpose: `2^{10}`, `\frac{6}{8}`. `_LEFT_ON_PURPOSE` has their commands; no other counts. Where
   the reference is another constant (`12\pi`), a sum of two plain numbers earns nothing unless the
   reference has one too: `(3+9)\pi`.
2. *Bases.* Where the reference is written in a base other than ten, the answer has to be in that
   base: 6 is no answer for `110_2`. Where it is not, digits in any base are worth what they are.

Without it, both count by their value. Whatever the setting, an answer that contradicts itself
(`35 = 34`), takes itself back (`7 is wrong`) or names more or other things than the reference
(`7 or 8`, `7, 7`) is not the reference, and earns nothing.
"""

from __future__ import annotations

import re

SUM = "a sum, difference or the like that is left to be worked out"
BASE = "not in the base of the reference"

_PRODUCT = re.compile(r"\\(?:cdot|times|div|frac|sqrt|left|binom|over|ast)(?![A-Za-z])")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_BINARY = re.compile(r"[\w)}\]!'|.%]\s?[+-]|[+-]\s?[+-]")
_OPENING_BAR = re.compile(r"(^|[({\[*^=,])\s?\|\s?[+-]")
_LEFT_ON_PURPOSE = (
    "frac|sqrt|cdot|times|div|over|ast|binom|pi|log|ln|exp|sin|cos|tan|cot|sec|csc|arcsin|arccos|"
    "arctan|sinh|cosh|tanh|lfloor|rfloor|lceil|rceil|overline|dot|circ|pmod|text|quad"
)
_TO_BE_DONE = re.compile(
    rf"\\(?!(?:{_LEFT_ON_PURPOSE})(?![A-Za-z]))[A-Za-z]|\\frac\s*\{{d\}}"
    r"|\b(?:plus|minus|max|min|gcd|lcm|lim|det|mod)\b"
)
_MIXED = re.compile(
    r"\d\s*\\frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))|\d\s+(\d+)\s*/\s*(\d+)"
)
_OF_NUMBERS = re.compile(
    r"(?:^|[({+\-=<>,\[])\s?\d+(?:\.\d+)?\s?[+-]\s?\d+(?:\.\d+)?\s?(?=$|[)}\]+\-=<>,])"
)


def has_sum(text: str) -> bool:
    """Whether anything is added or subtracted in an expression."""
    if _TO_BE_DONE.search(text) or any(map(_carries, _MIXED.finditer(text))):
        return True
    text = _OPENING_BAR.sub(r"\1|", text)  # |-5|
    return bool(_BINARY.search(_COMMAND.sub("c", _PRODUCT.sub("*", text))))


def _carries(mixed: re.Match) -> bool:
    """Whether the fraction of a mixed number is no part of one."""
    above, below = (group for group in mixed.groups() if group)
    return int(above) >= int(below)


def has_sum_of_numbers(text: str) -> bool:
    """Whether two plain numbers are added or subtracted in an expression."""
    return bool(_OF_NUMBERS.search(text)) or any(map(_carries, _MIXED.finditer(text)))
