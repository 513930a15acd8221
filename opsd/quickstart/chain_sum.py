"""The quickstart's task: short sums, with solutions in the model's own and in other styles.

A problem is a reasoning-gym `chain_sum` expression of three or four single digits. Its solution is
written in several styles:

- own, the model's, in digits and signs: ``4 - 1 = 3, 3 - 7 = -4. The answer is \\boxed{-4}.``
- words, which vary almost every time: ``Four minus one makes three; three minus seven makes minus
  four. So the answer is \\boxed{-4}.``
- terse: ``\\boxed{-4}``
- markdown, with LaTeX: ``**Step 1:** $4 - 1 = 3$ …``

The cold start teaches the model its own style. Later solutions are in another style, by default in
words, and only the teacher's prompt shows them: a model that imitates them (SFT) gives up its own
style, a model that learns from them (OPSD) does not.

Everything here is deterministic by seed; the training data contain no held-out expression.
"""

import itertools
import random
from dataclasses import dataclass, replace

from opsd.common.files import read_toml
from opsd.data.rows import Row
from opsd.data.solution_styles import SOLUTION_STYLES

TEACHER_SEED = 30_000_000  # plus the run's seed: the training problems of distill's teacher
HELD_OUT_SEED = 20_000_000
"""One set of held-out problems for every run, so that runs can be compared problem by problem."""

WORDS: dict[str, list[str]] = read_toml(__file__, "chain_sum")


@dataclass(frozen=True)
class ChainSum:
    """The quickstart's three sets of problems. They share no expression."""

    cold_start: list[Row]
    train: list[Row]
    held_out: list[Row]


def make_chain_sum(
    seed: int, *, cold_start: int, train: int, held_out: int, solution_style: str = "words"
) -> ChainSum:
    """Draw the cold start's problems, the training problems and the held-out problems.

    The held-out problems are the same for every seed. solution_style: one of SOLUTION_STYLES, for
    the training problems. Raises ValueError for an unknown style.
    """
    if solution_style not in SOLUTION_STYLES:
        known = ", ".join(SOLUTION_STYLES)
        raise ValueError(f"solution_style is {solution_style!r}: it must be one of {known}")
    held_out_rows = make_rows(HELD_OUT_SEED, held_out)
    rows = make_rows(seed, cold_start + train, avoid={row.problem for row in held_out_rows})
    learnt = rows[cold_start:]
    if solution_style != "words":
        learnt = [_row(row.problem, _WRITERS[solution_style](row.problem)) for row in learnt]
    return ChainSum(rows[:cold_start], learnt, held_out_rows)


def make_rows(
    seed: int, count: int, *, avoid: frozenset[str] | set[str] = frozenset()
) -> list[Row]:
    """`count` rows with different expressions, none of them in `avoid`, and solutions in words.

    Columns: `problem`, `solution` (in words), `answer`, `expression` (the same text as `problem`).
    """
    words = random.Random(f"words {seed}")
    # reasoning-gym draws item i with seed + i, so that neighbouring seeds would share nearly all.
    start = random.Random(f"chain_sum {seed}").randrange(2**40)
    expressions = map(reasoning_gym_expression, itertools.count(start))
    rows: dict[str, Row] = {}
    while len(rows) < count:
        expression = next(expressions)
        if expression not in rows and expression not in avoid:
            rows[expression] = _row(expression, in_words(expression, words))
    return list(rows.values())


def _row(expression: str, solution: str) -> Row:
    own = Row(expression, solution, str(evaluate(expression)), {})
    return replace(own, columns=own.texts | {"expression": expression})


def steps(expression: str) -> list[tuple[int, str, int, int]]:
    """The operations from left to right, each as (running value, sign, next term, result)."""
    first, *rest = expression.split()
    value = int(first)
    result = []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        after = value + int(term) if sign == "+" else value - int(term)
        result.append((value, sign, int(term), after))
        value = after
    return result


def evaluate(expression: str) -> int:
    """The value of the expression."""
    return steps(expression)[-1][-1]


def own_style(expression: str) -> str:
    """The solution in the model's own style, which the cold start teaches."""
    working = ", ".join(f"{a} {sign} {b} = {c}" for a, sign, b, c in steps(expression))
    return f"{working}. The answer is \\boxed{{{evaluate(expression)}}}."


def in_words(expression: str, rng: random.Random) -> str:
    """The solution in words, with wordings drawn from `rng`."""
    negative = rng.choice(WORDS["negative"])
    makes = rng.choice(WORDS["makes"])
    signs = {"+": rng.choice(WORDS["plus"]), "-": rng.choice(WORDS["minus"])}
    working = [
        f"{number_in_words(a, negative)} {signs[sign]} {number_in_words(b)} {makes} "
        f"{number_in_words(c, negative)}"
        for a, sign, b, c in steps(expression)
    ]
    text = rng.choice(WORDS["open"]) + rng.choice(WORDS["join"]).join(working)
    text = text[0].upper() + text[1:]
    return f"{text}. {rng.choice(WORDS['close'])} \\boxed{{{evaluate(expression)}}}."


def number_in_words(number: int, negative: str = "minus") -> str:
    """A number from -99 to 99 in English: ``thirty-six``, ``minus four``."""
    if number < 0:
        return f"{negative} {number_in_words(-number)}"
    if number < 20:
        return WORDS["ones"][number]
    tens, ones = divmod(number, 10)
    return WORDS["tens"][tens] + ("-" + WORDS["ones"][ones] if ones else "")


def terse(expression: str) -> str:
    """The solution that states only the result."""
    return f"\\boxed{{{evaluate(expression)}}}"


def in_markdown(expression: str) -> str:
    """The solution in Markdown, as a larger chat model would write it."""
    lines = [
        f"**Step {i}:** ${a} {sign} {b} = {c}$"
        for i, (a, sign, b, c) in enumerate(steps(expression), start=1)
    ]
    answer = f"**Final answer:** $\\boxed{{{evaluate(expression)}}}$"
    return "\n".join(["We work from left to right.", "", *lines, "", answer])


_WRITERS = {"own": own_style, "terse": terse, "markdown": in_markdown}


def reasoning_gym_expression(seed: int) -> str:
    """Draws the same expression as reasoning-gym's chain_sum with this seed, of 3 or 4 digits.

    It does not use that library, whose installation needs a compiler and Python's headers.
    """
    draw = random.Random(seed)
    terms = draw.randint(3, 4)
    draw.randint(1, 1)  # the number of digits, which reasoning-gym draws too
    numbers = [draw.randint(0, 9) for _ in range(terms)]
    signs = [draw.choice("+-") for _ in range(terms - 1)]
    first, *others = map(str, numbers)
    return " ".join([first, *itertools.chain.from_iterable(zip(signs, others, strict=True))])
