r"""What equals the reference and earns nothing, because the work is left to the reader.

A policy that is paid for equal values soon writes the problem's own numbers into the box:
`17 + 25 - 8` where the reference is 34. So, with `loss.reward.strict` (the default):

1. *Sums.* Where the reference is a plain number (an integer, a decimal, a fraction, a percentage,
   with or without a unit), an answer with a sum or a difference in it earns nothing, wherever in
   the answer it stands: `\frac{30+4}{1}`, `\sqrt{9+16}`, `\sum_{k=1}^{5} k`. Nor does a limit, an
   integral, a maximum or a greatest common divisor: that is the problem, not its answer. Products,
   powers, factorials, roots, binomials, logarithms and fractions count, since people leave them on
   purpose: `2^{10}`, `\frac{6}{8}`. Where the reference is another constant (`12\pi`), a sum of two
   plain numbers earns nothing unless the reference has one too: `(3+9)\pi`.
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
_TO_BE_DONE = re.compile(
    r"\\(?:sum|prod|int|iint|oint|pm|mp|lim|max|min|sup|inf|gcd|lcm|bmod|frac\s*\{d\})(?![A-Za-z])"
    r"|\b(?:plus|minus|max|min|gcd|lcm|lim)\b"
)
_OF_NUMBERS = re.compile(
    r"(?:^|[({+\-=<>,\[])\s?\d+(?:\.\d+)?\s?[+-]\s?\d+(?:\.\d+)?\s?(?=$|[)}\]+\-=<>,])"
)


def has_sum(text: str) -> bool:
    """Whether anything is added or subtracted in an expression."""
    if _TO_BE_DONE.search(text):
        return True
    text = _OPENING_BAR.sub(r"\1|", text)  # |-5|
    return bool(_BINARY.search(_COMMAND.sub("c", _PRODUCT.sub("*", text))))


def has_sum_of_numbers(text: str) -> bool:
    """Whether two plain numbers are added or subtracted in an expression."""
    return bool(_OF_NUMBERS.search(text))
