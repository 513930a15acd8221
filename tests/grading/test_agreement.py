"""How far verdicts agree with people's, by kind, on pairs judged one by one."""

import json
from collections import Counter
from pathlib import Path

import pytest

from opsd.data.thoughts import final_part
from opsd.grading.grader import Grader

ROOT = Path(__file__).parents[2]
PAIRS = [
    json.loads(line)
    for line in (ROOT / "tests" / "data" / "answer_pairs.jsonl").read_text("utf-8").splitlines()
]

# Where the grader is known to judge otherwise than a person: (given, answer). docs/evaluate.md
# lists them as well.
KNOWN_DISAGREEMENTS = {
    ("1, 2, 3, \\ldots, 10", "1,2,3,4,5,6,7,8,9,10"),
    ("2 \\text{ and } \\frac{3}{4}", "2\\frac34"),
    ("\\{1,\\dots,10\\}", "\\{1,2,\\ldots,10\\}"),
    ("\\min(a,b)", "\\min\\{a,b\\}"),
    ("quarter to four", "3:45"),
    ("(k,k+1)", "(n,n+1)"),
    ("n \\equiv 1 \\pmod{4}", "n=4k+1"),
    ("36 (eggs)", "36"),
    ("12 \\text{ percent off}", "12"),
    ("0\\le x\\le 2, x\\ne 1", "[0,2]\\setminus\\{1\\}"),
    ("a>0, b>0", "a,b>0"),
    ("\\frac{a}b c", "ac/b"),
    ("\\text{Evelyn is the fastest}", "\\text{Evelyn}"),
    ("\\text{Yes, because } 2<3", "\\text{Yes}"),
    ("0.25\\ \\text{mol/L}", "0.25 M"),
    ("32", "m+n=32"),
    ("\\lfloor\\frac{n+1}{2}\\rfloor", "\\left\\lceil\\frac n2\\right\\rceil"),
    ("\\frac{1}{2} \\text{ or } 0.5", "0.5"),
    ("5 (\\text{since } 6 \\text{ fails})", "5"),
    ("\\text{five } (5)", "5"),
    ("\\frac{d}{dx}(x^3)=3x^2", "3x^2"),
    ("4", "\\sigma^2 = 4"),
    ("0.5^\\circ", "30'"),
    ("(1,3)\\cup(5,\\infty)", "x\\in(1,3)\\text{ or }x>5"),
    ("\\operatorname{diag}(1,2)", "\\begin{pmatrix}1&0\\\\0&2\\end{pmatrix}"),
    ("2x=10\\Rightarrow x=5", "x=5"),
    ("dc+ba", "ab+cd"),
    ("\\nabla\\times \\mathbf{B}", "\\nabla \\times \\vec{B}"),
    ("\\frac{x^2}{2}+C", "\\frac12x^2+K"),
    ("[1,2]^T", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("(1,2)^{T}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("\\text{half past three}", "3:30"),
    ("\\overline{1-2i}", "1+2i"),
    ("C because it is 7", "C"),
    ("\\underbrace{6}_{\\text{ans}}", "6"),
    ("True", "T"),
    ("False", "F"),
    (
        "Final: \\boxed{\\begin{array}{c} 1 \\\\ 2 \\end{array}}",
        "\\begin{pmatrix}1\\\\2\\end{pmatrix}",
    ),
}


def completion(pair):
    """`given` is what a box holds, or a whole completion, which is graded after its thought."""
    if pair.get("whole"):
        return final_part(pair["given"])
    return f"So the answer is \\boxed{{{pair['given']}}}."


@pytest.fixture(scope="module")
def grades():
    with Grader(timeout=20) as grader:
        return grader.grade(list(map(completion, PAIRS)), [pair["answer"] for pair in PAIRS])


def test_the_table_is_what_it_should_be():
    assert len(PAIRS) >= 800
    assert sum(not pair["correct"] for pair in PAIRS) >= 150
    assert len({(pair["given"], pair["answer"]) for pair in PAIRS}) == len(PAIRS)
    assert all(pair["kind"] and pair["source"] for pair in PAIRS)


def test_no_comparison_ends_in_an_error(grades):
    assert [grade.reason for grade in grades if "cannot be compared" in grade.reason] == []


def test_nothing_is_accepted_that_must_earn_nothing(grades):
    accepted = [
        (pair["given"], pair["answer"], grade.reason)
        for pair, grade in zip(PAIRS, grades, strict=True)
        if grade.correct and not pair["correct"]
    ]
    assert accepted == []


def test_agreement(grades):
    differ = {
        (pair["given"], pair["answer"]): grade.reason
        for pair, grade in zip(PAIRS, grades, strict=True)
        if grade.correct is not pair["correct"]
    }
    assert set(differ) == KNOWN_DISAGREEMENTS, differ
    assert all(grade.reason for grade in grades)
    agreement = 100 * (1 - len(differ) / len(PAIRS))
    assert agreement >= 99.5
    document = (ROOT / "docs" / "evaluate.md").read_text("utf-8")
    assert f"{len(PAIRS)} pairs" in document and f"{agreement:.2f} %" in document


def test_the_document_has_the_table():
    document = (ROOT / "docs" / "agreement.md").read_text("utf-8")
    for kind, pairs in Counter(pair["kind"] for pair in PAIRS).items():
        wrong = sum(pair["kind"] == kind and not pair["correct"] for pair in PAIRS)
        assert f"| {kind} | {pairs} | {wrong} |" in document, kind
