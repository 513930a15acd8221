"""What a dataset's answers say, and that what cannot be told is refused by row and column."""

import contextlib
import json
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsd.common.errors import UserError
from opsd.data.boxed import is_placeholder, last_boxed
from opsd.data.references import MOST_CHARACTERS, Unreadable, final_answer, unreadable
from opsd.data.rows import load_rows
from opsd.data.thoughts import final_part
from opsd.grading.grader import Grader, _grade_here

UNDERSTOOD = [
    ("5", "5"),
    ("2+3=5\n#### 5", "5"),
    ("2+3=5\n#### 5\n#### end", "5"),
    ("#### 1,024 ", "1,024"),
    ("So it is \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
    ("We add: $2+3=5$. So the sum is $\\boxed 5$.", "5"),
    ("\\boxed{3} or \\boxed{5}", "3, 5"),
    ("The roots are $x=\\boxed{3}$ and $x=\\boxed{5}$.", "3, 5"),
    ("$x=\\boxed{3}$, $y=\\boxed{5}$", "x=3, y=5"),
    ("\\boxed{5}. Checking: \\boxed{5}", "5"),
    ("\\boxed{5} \\boxed{}", "5"),
    ("['3', '5']", "3, 5"),
    ('["A"]', "A"),
    ("('3', '5')", "3, 5"),
    ("[0, 1)", "[0, 1)"),
    ("[3, 5]", "[3, 5]"),  # an interval, perhaps
    ("\\textbf{(B)}\\ 5", "\\textbf{(B)}\\ 5"),
    ("We get 4+5. The answer is 9.", "9"),
    ("Final answer: 9", "9"),
    ("Therefore, the answer is 9.", "9"),
    ("Final Answer: The final answer is $9$. I hope it is correct.", "$9$"),
    ("The correct answer is (B) 12.", "(B) 12"),
    ("Option B is correct.", "B"),
    ("**9**", "9"),
    ("\u6545\u7b54\u6848\u4e3a\uff1a9\uff0e", "9"),  # Chinese: so the answer is 9
    ("<think>4</think><answer>9</answer>", "9"),
    ("Alice and Bob", "Alice and Bob"),
    ("\\text{NH}_4^+", "\\text{NH}_4^+"),
    ("\\mathbb{R}^+", "\\mathbb{R}^+"),
    ("z^*", "z^*"),
    ("no real solutions exist", "no real solutions exist"),
    ("20 minutes and 5 seconds", "20 minutes and 5 seconds"),
    ("\\begin{cases}x=1\\\\y=2\\end{cases}", "\\begin{cases}x=1\\\\y=2\\end{cases}"),
]
REFUSED = [
    ("We prove that the sequence converges.", "prose"),
    ("Let x be the number of apples. Then", "prose"),
    ("It depends on n: it is 2 for even n and 3 for odd n.", "prose"),
    ("\\text{(A) 3 (B) 4 (C) 5}", "prose"),
    ("3 or 4?", "prose"),
    ("5 because 2+3=5", "prose"),
    ("5\n\nExplanation: 2+3", "prose"),
    ("To solve this problem, we need to add", "prose"),
    ("Hence proved.", "names no final answer"),
    ("Answers will vary.", "names no final answer"),
    ("I don't know", "names no final answer"),
    ("(see figure)", "names no final answer"),
    ("[None]", "names no final answer"),
    ("N.A.", "names no final answer"),
    ("The answer is", "names no final answer"),
    ("<answer>", "names no final answer"),
    ("We add 20 and 25 to get 45, then halve it to get 22.5 litres.", "prose"),
    ("First x = 4. Then y = 9. So x + y = 13, which is the answer we want.", "prose"),
    ("Let n be the number of apples. Since 3n = 12 we have n = 4.", "prose"),
    ("She has $12 and spends $5, so $7 are left.", "prose"),
    ("Two and three are added.\nThe total is five, that is 5 apples.", "prose"),
    ("\\boxed{4} apples. Later the total becomes \\boxed{9}.", "several boxes"),
    ("#### 5\n#### 6", "several final answers"),
    ("The total is \\boxed{12", "cut off"),
    ("\\boxed{8} and \\boxed{12", "cut off"),
    ("\\frac{1}{", "cut off"),
    ("x = ", "cut off"),
    ("2 + 3 +", "cut off"),
    ("(1, 2", "cut off"),
    ("so ####", "no final answer"),
    ("\\boxed{}", "empty box"),
    ("['']", "no final answer"),
    ("proof", "no final answer"),  # NuminaMath has these two
    ("notfound", "no final answer"),
    ("See image", "no final answer"),
    ("Answer not provided", "no final answer"),
    ("[]", "no final answer"),
    ("\\ldots", "no final answer"),
    ("<image>", "no final answer"),
    ('{"answer": "34"}', "object in a string"),
    ("5<|im_end|>", "holds"),  # decoded with its special tokens
    ("#### 5</s>", "holds"),
    ("5</answer>", "holds"),
    ("<think>2 + 3</think>5", "holds"),
    ("```\n5\n```", "holds"),
    ("<b>5</b>", "holds"),
    ("&minus;5", "holds"),
    ("array(['5'], dtype=object)", "holds"),
    ("np.float64(5.0)", "holds"),
    ("Let x = 17. Then 2x = 34.", "prose"),
    ("7" * (MOST_CHARACTERS + 1), "longer than"),
]


@pytest.mark.parametrize("text, answer", UNDERSTOOD)
def test_understood(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize("text, problem", REFUSED)
def test_refused_by_row_and_column(text, problem, tmp_path):
    with pytest.raises(Unreadable, match=problem):
        final_answer(text)
    source = tmp_path / "rows.jsonl"
    rows = [{"problem": "p", "a": "4"}, {"problem": "q", "a": text}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"answer": "a"}
    with pytest.raises(UserError, match=rf"row 2 of .*column 'a' \(answer\).*{problem}"):
        load_rows(str(source), columns=columns, require=("problem", "answer"))
    # A template may show what nobody grades.
    rows = load_rows(str(source), columns=columns, require=("problem", "answer"), graded=False)
    assert rows[1].answer == text


def test_a_grader_accepts_nothing_for_prose():
    with Grader() as grader:
        for reference, problem in REFUSED[:5]:
            for answer in ("4", "5", "7", "9", "12", "13", "20", "22.5", "45"):
                (grade,) = grader.grade([f"\\boxed{{{answer}}}"], [reference])
                assert not grade.correct and grade.failed and problem in grade.reason


SHAPES = [
    *("7", "1+", "(", "{", "\\frac{1}{", "2^{", " ", "\\text{a} ", "apple ", "1,", "\\boxed{1} "),
    *(
        "\\boxed{",
        "\\boxed 1 ",
        "#### 1 ",
        "a\n",
        " \n",
        "\N{FULLWIDTH DIGIT ONE}",
        "eq=",
        "$",
        "1:",
    ),
    *("answer is ", "<answer>", "1e", "1 !", "A b. ", "['", "**a", "C_", "\\overline{", "|"),
    *("\\hat{\\mathbf{", "\\begin{a}"),
]


SHAPES += [
    "...",
    "(a)  ",
    "think",
    "</",
    "<",
    "\\text {",
    "\r\n",
    "\t",
    "we = ",
    "\\end",
    "thus ",
    "^",
]


@contextlib.contextmanager
def processor_time(seconds):
    """Ends what takes longer, by the process's own time, of which a busy machine gives less a
    second but needs no more. The regular expressions' engine looks for signals while it works."""

    def late(*_):
        raise AssertionError(f"more than {seconds} s of processor time")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def prepared(text):
    """All that the parent process does with a text before any worker sees it: with a reference, a
    completion, and a pair of answers."""
    with contextlib.suppress(Unreadable):
        final_answer(text)
    last_boxed(text)
    final_part(text)
    final_part(f"<think>{text}", in_thought=True)
    last_boxed(f"\\boxed{{1}}{text}\\boxed{{2}}")
    for part in (text, text[:3900], text[-3900:], text[:75], text[:55]):
        is_placeholder(part)
        unreadable(part[:4000])
        _grade_here(part, f"y{part}")
        _grade_here("x+1", f"y{part}")
        last_boxed(f"\\boxed{{1}}{part}!\\boxed{{2}}\\boxed{{{part}!}}")


@pytest.mark.parametrize("shape", SHAPES)
def test_reading_takes_linear_time(shape):
    """A fifth of a millisecond a kB on a quiet machine. What is quadratic takes minutes here."""
    with processor_time(5):
        prepared(shape * (200_000 // len(shape)))


@given(
    st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from("z1! "),
)
def test_mixed_texts_are_read_in_linear_time(parts, in_turn, end):
    """20 kB took 14 s of processor time, and 79 dots in a box for ever."""
    text = "".join(parts) if in_turn else "".join(part * 200 for part in parts)
    with processor_time(1):
        prepared(text * (20_000 // len(text) + 1) + end)


def test_longer_texts_than_4000_characters_are_not_compared():
    """By the reason: to read them would take long."""
    with Grader() as grader:
        for answer, reference in (("1+" * 2000 + "1", "5"), ("5", "1+" * 2000 + "1")):
            (grade,) = grader.grade([f"\\boxed{{{answer}}}"], [reference])
            assert grade.failed and "is longer than 4000 characters" in grade.reason
