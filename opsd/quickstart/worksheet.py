"""The tiny quickstart's task: a worksheet of four independent pieces of arithmetic.

    problem   12+7;5*8;46-8;9*7
    worked    12+7=19;5*8=40;46-8=38;9*7=63
    solution  19=12+7,40=5*8,38=46-8,63=9*7
    answer    19;40;38;63

`worked` is the form in which the base model learns to answer. The reference `solution`, which only
the teacher's prompt shows and SFT has to imitate, is in somebody else's: the result comes first.
Both forms count as right.

The items are independent on purpose. A model of 0.8M parameters that is shown the solution copies
it; after an error of the student's the next item is again one that it can copy, so its advice stays
good to the end of the rollout. Where a later number depends on an earlier one, an error takes such
a teacher off its track for the rest.

A worksheet is held out if a checksum of its text says so, whatever the seed: rows for training and
rows for evaluation can therefore never meet, in any two calls. Single items (`12+7`) do occur on
both sides; whole worksheets do not.
"""

import random
import re
import zlib
from collections.abc import Sequence

from opsd.data.rows import Row
from opsd.grading.grader import Grade, Grader

ITEMS = 4
_HELD_OUT_SHARE = 8  # one worksheet in eight is kept for evaluation


def worksheet_rows(count: int, *, seed: int, held_out: bool = False) -> list[Row]:
    """`count` different worksheets, always the same ones for the same arguments.

    Args:
        count: how many rows.
        seed: of the random numbers; training and held-out rows are disjoint for any two seeds.
        held_out: draw from the worksheets kept for evaluation rather than from those for training.
    """
    rng = random.Random(f"worksheet {seed} {'held out' if held_out else 'training'}")
    rows: dict[str, Row] = {}
    while len(rows) < count:
        items = [_item(rng) for _ in range(ITEMS)]
        problem = ";".join(question for question, _ in items)
        if is_held_out(problem) == held_out and problem not in rows:
            rows[problem] = _row(problem, items)
    return list(rows.values())


def is_held_out(problem: str) -> bool:
    """Whether this worksheet is kept for evaluation: a property of its text alone."""
    return zlib.crc32(problem.encode()) % _HELD_OUT_SHARE == 0


_STATEMENT = re.compile(r"\d+[-+*]\d+=(\d+)|(\d+)=\d+[-+*]\d+")


class WorksheetGrader(Grader):
    """Grades a completion by the results it states, in either form: all of them, in order.

    A worksheet has no \\boxed answer, and a symbolic comparison of `12+7=20` would find a (false)
    equation rather than a result. So this grader compares texts and never starts a worker.
    """

    def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[Grade]:
        """One `Grade` a completion; `extracted` holds the stated results: `19;40;38;63`."""
        if len(completions) != len(answers):
            raise ValueError(f"{len(completions)} completions but {len(answers)} answers")
        return [self._grade(*pair) for pair in zip(completions, answers, strict=True)]

    def _grade(self, completion: str, answer: str) -> Grade:
        stated = _results(completion)
        if not stated:
            return Grade(False, "no result stated", None)
        extracted = ";".join(stated)
        correct = extracted == answer
        return Grade(correct, "all results right" if correct else "a result differs", extracted)


def right_share(completion: str, answer: str) -> float:
    """The share (0 to 1) of a worksheet's results that a completion states, in their place."""
    stated = _results(completion)
    wanted = answer.split(";")
    return sum(a == b for a, b in zip(stated, wanted, strict=False)) / len(wanted)


def _results(completion: str) -> list[str]:
    return [worked or foreign for worked, foreign in _STATEMENT.findall(completion)]


def _item(rng: random.Random) -> tuple[str, int]:
    operator, b = rng.choice("+-*"), rng.randint(2, 9)
    a = rng.randint(2, 9) if operator == "*" else rng.randint(10, 99)
    result = {"+": a + b, "-": a - b, "*": a * b}[operator]
    return f"{a}{operator}{b}", result


def _row(problem: str, items: list[tuple[str, int]]) -> Row:
    columns = {
        "problem": problem,
        "solution": ",".join(f"{result}={question}" for question, result in items),
        "answer": ";".join(str(result) for _, result in items),
        "worked": ";".join(f"{question}={result}" for question, result in items),
    }
    return Row(columns["problem"], columns["solution"], columns["answer"], columns)
