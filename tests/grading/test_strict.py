"""What equals the reference and earns nothing, and the one switch for it."""

import pytest

from opsd.grading.answers import strict
from opsd.grading.grader import Grader

# (given, reference, the reason): wrong if strict, right if not.
BY_THE_SWITCH = [
    ("17 + 25 - 8", "34", strict.SUM),
    ("\\sqrt{9+16}", "5", strict.SUM),
    ("\\frac12+\\frac13", "\\frac56", strict.SUM),
    ("(30+4, 5)", "(34, 5)", strict.SUM),
    ("(3+9)\\pi", "12\\pi", strict.SUM),
    ("17\\frac{17}{1}", "34", strict.SUM),
    ("6 hours 60 minutes", "7 hours", strict.SUM),
    ("6^\\circ 60'", "7^\\circ", strict.SUM),
    ("\\begin{vmatrix}17&-17\\\\1&1\\end{vmatrix}", "34", strict.SUM),
    ("6", "110_2", strict.BASE),
]
NEVER = [("35 = 34", "34"), ("7 or 8", "7"), ("7 is wrong", "7"), ("7, 7", "7"), ("(5,3)", "(3,5)")]


@pytest.mark.parametrize("on", [True, False])
def test_the_switch(on):
    with Grader(strict=on) as grader:
        pairs = [*((given, wanted) for given, wanted, _ in BY_THE_SWITCH), *NEVER]
        grades = grader.grade([f"\\boxed{{{g}}}" for g, _ in pairs], [w for _, w in pairs])
    first, never = grades[: len(BY_THE_SWITCH)], grades[len(BY_THE_SWITCH) :]
    assert [grade.correct for grade in first] == [not on] * len(first)
    assert not any(grade.correct for grade in never) and all(grade.reason for grade in never)
    if on:
        assert [grade.reason for grade in first] == [reason for _, _, reason in BY_THE_SWITCH]


@pytest.mark.parametrize(
    "text, summed",
    [("17+25", 1), ("2^{-1}", 0), ("|-5|", 0), ("-5", 0), ("10^{-3}", 0), ("--5", 1), ("5-3", 1),
     ("3\\cdot -5", 0), ("\\frac{1}{-2}", 0), ("\\sqrt{2}-1", 1), ("|3|-2", 1), ("7!-1", 1),
     ("3\\frac{1}{2}", 0), ("3\\frac{4}{2}", 1), ("\\det A", 1), ("\\lfloor 7.5 \\rfloor", 0),
     ("\\begin{vmatrix}1&2\\\\3&4\\end{vmatrix}", 0),
     ("\\begin{vmatrix}17&1\\\\-17&1\\end{vmatrix}", 1)],
)  # fmt: skip
def test_what_a_sum_is(text, summed):
    assert strict.has_sum(text) is bool(summed)
