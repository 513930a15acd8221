r"""Find answers that equal the reference but earn nothing, because they leave work to the reader.

A policy that is rewarded for equal values soon writes the problem's own numbers into the box:
`17 + 25 - 8` if the reference is 34. So, with `loss.reward.strict` (the default):

1. *Sums.* If the reference is a plain number (an integer, a decimal, a fraction, a percentage, with
   or without a unit), an answer that contains a sum or a difference anywhere earns nothing:
   `\frac{30+4}{1}`, `\sqrt{9+16}`, `17\frac{17}{1}`. Nor does a limit, an integral or a maximum,
   which states the problem, or a determinant with zeros or ones. Products, powers, factorials,
   roots, binomials, logarithms, fractions and other determinants count, since people leave them on
   purpose: `2^{10}`, `\frac{6}{8}`. A logarithm of a product is a sum of them and does not count.
   `to_be_done` in notation.toml lists them; no other command counts. If the reference is another
   constant (`12\pi`), a sum of two plain numbers or of like terms, `(3+9)\pi` or `3\pi+9\pi`, earns
   nothing unless the reference has one too. Whatever the reference is, an integral, a limit, a
   derivative or a maximum earns nothing if the reference has none of its kind: it states the
   problem. So does `\sum` or `\prod` where the reference is a constant.
2. *Inequalities.* If the reference says where a name lies (`(2,3)`, `x>3`), the answer must say it
   too: `x^2-5x+6<0` is left to be solved.
3. *Bases.* If the reference is in a base other than ten, the answer must be in that base: 6 is no
   answer for `110_2`. Otherwise digits in any base count by their value.

Without it, all count by their value. In either case an answer earns nothing if it contradicts
itself (`35 = 34`), takes itself back (`7 is wrong`) or says more or other things than the reference
(`7 or 8`, `7, 7`).
"""

import re
from math import isqrt

from opsd.grading.answers.notation import FORM
from opsd.grading.answers.renamed import is_bare, letters

SUM = "a sum, difference or the like that is left to be worked out"
BASE = "not in the base of the reference"
UNSOLVED = "an inequality that is left to be solved"


def has_sum(text: str) -> bool:
    """Whether an expression contains an addition or a subtraction."""
    text = FORM.determinant.sub("1", text)
    to_be_done = FORM.to_be_done.search(text) or FORM.log_of_product.search(text)
    if to_be_done or any(map(_carries, FORM.mixed.finditer(text))):
        return True
    text = FORM.opening_bar.sub(r"\1|", text)  # |-5|
    return bool(FORM.binary.search(FORM.command.sub("c", FORM.product.sub("*", text))))


def _carries(mixed: re.Match) -> bool:
    """Whether the fraction of a mixed number is 1 or more."""
    above, below = (group for group in mixed.groups() if group)
    return int(above) >= int(below)


def adds_constants(wanted: str, given: str) -> bool:
    """Whether the answer adds numbers, like terms or roots, and the reference does not."""
    if has_sum_of_numbers(given) and not has_sum_of_numbers(wanted):
        return True
    roots = [[int(digits) for digits in found if digits] for found in FORM.of_roots.findall(given)]
    return any(isqrt(a * b) ** 2 == a * b for a, b in roots) and not has_sum(wanted)


def has_sum_of_numbers(text: str) -> bool:
    """Whether an expression contains a sum or a difference of two plain numbers."""
    return bool(FORM.of_numbers.search(text)) or any(map(_carries, FORM.mixed.finditer(text)))


def states_the_problem(wanted: str, given: str) -> bool:
    """Whether the answer has an integral or the like, and the reference none of its kind."""
    both = (FORM.determinant.sub("1", side) for side in (given, wanted))
    ours, theirs = ({found.lastgroup for found in FORM.stated.finditer(side)} for side in both)
    return bool(ours - theirs - ({"sum"} if letters(wanted) else set()))


def is_left_to_be_solved(wanted: str, given: str) -> bool:
    """Whether the reference says where a name lies, and the answer where an expression with it."""
    solved = [side for side in FORM.sides.split(wanted) if is_bare(side.strip())]
    unknown = letters(given) - letters(wanted)
    if len(FORM.sides.split(wanted)) > 1 and (names := letters(" ".join(solved))):
        unknown = names
    sides = (
        [side.strip() for side in FORM.sides.split(given)] if FORM.relations.search(given) else []
    )
    return any(letters(side) & unknown and not is_bare(side) for side in sides)
