"""Find answers that would take too long to compute."""

import math
import re

from opsd.grading.answers.notation import PATTERNS

MOST_CHARACTERS = 4000
MOST_DIGITS = 100_000

_POWER = PATTERNS["power"]
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_FACTORIAL = re.compile(r"(?<!\d)(\d+)\s?\)?\s?!")
_BINOMIAL = re.compile(r"\\[dt]?binom\s?\{\s?(\d+)\s?\}")
_EXPONENT = re.compile(r"\d[eE]\+?(\d+)")


def too_large(answer: str) -> bool:
    """Whether the answer has a number of more than MOST_DIGITS digits, as a power, a factorial or a
    binomial: sympy would compute all of its digits."""
    answer = " ".join(answer.split())
    for power in _POWER.finditer(answer):
        value = 1.0
        for number in reversed(_NUMBER.findall(power.group())):
            base = float(number) if len(number) < 300 else math.inf
            # `value`, the power to the right, is the exponent of this base
            digits = value * math.log10(base) if base > 1 else 0.0
            if digits > MOST_DIGITS:
                return True
            value = base**value if digits < 300 else math.inf
    arguments = [*_FACTORIAL.findall(answer), *_BINOMIAL.findall(answer)]
    exponents = _EXPONENT.findall(answer)
    return any(len(n) > 6 or int(n) > MOST_DIGITS // 5 for n in arguments) or any(
        len(n) > 6 or int(n) > MOST_DIGITS for n in exponents
    )
