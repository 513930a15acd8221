"""Find answers that would take too long to compute."""

import math

from opsd.grading.answers.notation import FORM

MOST_CHARACTERS = 4000
MOST_DIGITS = 100_000


def too_large(answer: str) -> bool:
    """Whether the answer has a number of more than MOST_DIGITS digits, as a power, a factorial or a
    binomial: sympy would compute all of its digits."""
    answer = " ".join(answer.split())
    for power in FORM.power.finditer(answer):
        value = 1.0
        for number in reversed(FORM.number.findall(power.group())):
            base = float(number) if len(number) < 300 else math.inf
            # `value`, the power to the right, is the exponent of this base
            digits = value * math.log10(base) if base > 1 else 0.0
            if digits > MOST_DIGITS:
                return True
            value = base**value if digits < 300 else math.inf
    arguments = [*FORM.factorial.findall(answer), *FORM.binomial.findall(answer)]
    exponents = FORM.exponent.findall(answer)
    return any(len(n) > 6 or int(n) > MOST_DIGITS // 5 for n in arguments) or any(
        len(n) > 6 or int(n) > MOST_DIGITS for n in exponents
    )
