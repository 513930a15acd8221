"""The majority of a problem's answers: equal by the grader, ties, none, too few."""

import pytest

from opsd.grading.grader import Grader
from opsd.grading.majority import Majority, majority


@pytest.fixture(scope="module")
def grader():
    with Grader() as made:
        yield made


@pytest.mark.parametrize(
    ("answers", "agreement", "wanted"),
    [
        (["3", "4", "3", "5"], 0.5, Majority("3", 0.5)),
        (["3", "4", "3", "5"], 0.51, Majority("", 0.5, "unsure")),
        # Forms of one number are one answer, whose commonest form is told.
        (["1/2", "0.5", "7", "7", "0.5"], 0.0, Majority("0.5", 0.6)),
        ([r"\frac{2}{4}", "x+1", "1+x", r"\frac12", "1 + x"], 0.5, Majority("x+1", 0.6)),
        (["3", "4", "4.0", "3"], 0.0, Majority("", 0.5, "tied")),
        (["3", "4", "5", "6"], 0.0, Majority("", 0.25, "tied")),
        # A rollout without an answer has no vote, and counts among all.
        (["3", "3", None, " ", None], 0.4, Majority("3", 0.4)),
        (["3", "3", None, " ", None], 0.5, Majority("", 0.4, "unsure")),
        (["3", None, None, None], 0.0, Majority("", 0.25, "unsure")),  # agrees with nobody
        ([None, "", None], 0.0, Majority("", 0.0, "unanswered")),
        (["10 cm", "10", "10cm"], 0.6, Majority("10 cm", 1.0)),
    ],
)
def test_which_answer_is_the_majoritys(answers, agreement, wanted, grader):
    found = majority(answers, grader, agreement)
    assert (found.answer, found.why) == (wanted.answer, wanted.why)
    assert found.share == pytest.approx(wanted.share) and found.correct is None


@pytest.mark.parametrize(
    ("own", "correct"), [("0.25", True), ("1/2", False), (" ", None), ("", None)]
)
def test_whether_a_majority_is_the_rows_own_answer(own, correct, grader):
    assert majority([r"\frac14", r"\frac14", "3"], grader, own=own).correct is correct
    assert majority([r"\frac14", "3"], grader, own=own).correct is None  # a tie
