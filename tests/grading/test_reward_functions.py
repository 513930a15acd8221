"""Reward functions from Python: what each kind is called with, and what it may return."""

import pytest

from opsd.common.errors import UserError
from opsd.data.rows import load_rows
from opsd.grading.reward_functions import verifier_of

ROWS = load_rows(
    [{"problem": "1+1?", "answer": "2", "level": 1}, {"problem": "2+2?", "answer": "4"}],
    require=["problem"],
)
TEXTS = ["two", "4"]


def graded(functions, texts, rows):
    return verifier_of(functions)[0](texts, rows)


def test_trls_kind_is_given_lists_by_keyword():
    seen = {}

    def reward(completions, **columns):
        seen.update(columns, completions=completions)
        return [0.5, None]

    assert graded([reward], TEXTS, ROWS) == [(0.5, ""), (0.0, "")]
    assert seen == {
        "completions": TEXTS,
        "prompts": ["1+1?", "2+2?"],
        "problem": ["1+1?", "2+2?"],
        "solution": ["", ""],
        "answer": ["2", "4"],
        "level": [1, None],
    }


def test_a_function_gets_only_the_keywords_that_it_names():
    def right(completions, answer):
        return [float(said == wanted) for said, wanted in zip(completions, answer, strict=True)]

    assert graded([right], TEXTS, ROWS) == [(0.0, ""), (1.0, "")]


def test_rows_that_are_chats_are_shown_as_messages_as_by_trl():
    prompt = [{"role": "user", "content": "1+1?"}]
    rows = load_rows([{"prompt": prompt, "answer": "2"}], require=["problem"])

    def reward(prompts, completions):
        assert prompts == [prompt]
        return [float(completion[0]["content"] == "two") for completion in completions]

    assert graded([reward], TEXTS[:1], rows) == [(1.0, "")]


def test_scores_add_up_and_feedbacks_are_kept():
    def ours(completion, row):
        return row["answer"] == completion, f"not {completion}"

    both = graded([ours, lambda completions, **_: [1, 2]], TEXTS, ROWS)
    assert both == [(1.0, "not two"), (3.0, "not 4")]


@pytest.mark.parametrize(
    "function, said",
    [
        (lambda completions: [1.0], r"returned \[1.0\]: it must return a finite number for each"),
        (lambda completions: [1.0, float("nan")], "it must return a finite number for each of 2"),
        (lambda completions: 1 / 0, "raised ZeroDivisionError"),
        (lambda completion, row: None, "it must return a finite number"),
        (
            lambda completion_ids, **_: [0, 0],
            r"raised TypeError.*'completion_ids'",
        ),
    ],
)
def test_what_a_function_may_not_do(function, said):
    with pytest.raises(UserError, match=said):
        graded([function], TEXTS, ROWS)
