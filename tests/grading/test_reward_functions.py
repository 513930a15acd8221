"""Reward functions from Python: what each kind is called with, and what it may return."""

import asyncio
import time
from decimal import Decimal
from fractions import Fraction
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from opsd.common.errors import UserError
from opsd.data.rows import load_rows
from opsd.grading.reward_functions import verifier_of
from opsd.grading.rewards import own_verifier

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


async def taken_for_messages(completions):
    return [c[0]["content"] for c in completions]


@pytest.mark.parametrize(
    "function, said",
    [
        (lambda completions: [1.0], r"returned \[1.0\]: it must return a finite number for each"),
        (lambda completions: [1.0, float("nan")], "it must return a finite number for each of 2"),
        (lambda completions: 1 / 0, "raised ZeroDivisionError"),
        (lambda completions: [c[0]["content"] for c in completions], "completions are texts, and"),
        (taken_for_messages, "completions are texts, and"),
        (lambda completion, row: None, "it must return a finite number"),
        (lambda completions, ground_truth: [0, 0], r"raised TypeError.*'ground_truth'"),
    ],
)
def test_what_a_function_may_not_do(function, said):
    with pytest.raises(UserError, match=said):
        graded([function], TEXTS, ROWS)


HALF = {
    "an int": 1,
    "a bool": True,
    "numpy's float32": np.float32(0.5),
    "numpy's int64": np.int64(1),
    "numpy's bool": np.bool_(True),
    "numpy's array without dimensions": np.array(0.5),
    "a tensor": torch.tensor(0.5),
    "a tensor of one": torch.tensor([0.5]),
    "a tensor in bf16": torch.tensor(0.5, dtype=torch.bfloat16),
    "a tensor of the truth": torch.tensor(True),
    "a fraction": Fraction(1, 2),
    "a decimal": Decimal("0.5"),
}
NONE = {
    "None": None,
    "a text": "0.5",
    "a list": [0.5],
    "verl's dict": {"score": 0.5},
    "a complex number": 1j,
    "numpy's nan": np.float32("nan"),
    "a tensor of two": torch.tensor([1.0, 2.0]),
    "an infinite number": float("inf"),
}


@pytest.mark.parametrize("kind", ["rows", "lists", "async rows", "async lists", "a class"])
@pytest.mark.parametrize("name", [*HALF, *NONE])
def test_a_score_is_a_finite_number_of_any_type(name, kind):
    """TRL 4567, 7213 and 6533: functions that are async, also by class; values of any type."""
    value = (HALF | NONE)[name]

    class OfLists:
        async def __call__(self, completions, **_):
            return [value] * len(completions)

    async def of_lists(completions, **_):
        await asyncio.sleep(0)
        return [value] * len(completions)

    async def of_rows(completion, row):
        await asyncio.sleep(0)
        return value

    functions = {
        "rows": lambda completion, row: value,
        "lists": lambda completions, **_: [value] * len(completions),
        "async rows": partial(of_rows),
        "async lists": of_lists,
        "a class": OfLists(),
    }
    if name in NONE and not (value is None and "row" not in kind):  # TRL's None judges nothing
        with pytest.raises(UserError, match="it must return a finite number"):
            graded([functions[kind]], TEXTS, ROWS)
    else:
        expected = 0.0 if value is None else float(value)
        assert graded([functions[kind]], TEXTS, ROWS) == [(expected, "")] * 2


@pytest.mark.parametrize(
    "scores",
    [
        (1.0, 0.0),
        np.array([1.0, 0.0], dtype=np.float32),
        torch.tensor([[1.0], [0.0]]),
        [torch.tensor(1.0), False],
        pd.Series([1.0, 0.0]),
        (number for number in (1, 0)),
    ],
)
def test_scores_come_in_any_list(scores):
    assert graded([lambda completions, **_: scores], TEXTS, ROWS) == [(1.0, ""), (0.0, "")]


@pytest.mark.parametrize(
    "scores", [1.0, None, True, [[1.0], [0.0]], {"a": 1, "b": 2}, "10", [1e400, 0]]
)
def test_what_are_no_scores_is_named_and_not_raised(scores):
    with pytest.raises(UserError, match=r"returned .*finite number for each of 2"):
        graded([lambda completions, **_: scores], TEXTS, ROWS)


def test_async_functions_run_together_and_inside_a_notebooks_loop():
    async def slow(completion, row):
        await asyncio.sleep(0.5)
        return 1.0

    async def cell():
        return graded([slow], TEXTS * 20, ROWS * 20)

    begun = time.monotonic()
    assert asyncio.run(cell()) == [(1.0, "")] * 40
    assert time.monotonic() - begun < 10  # one by one they take 20 seconds


def test_an_async_function_that_fails_is_named_with_its_problem():
    async def fails(completion, row):
        raise TimeoutError("no answer")

    with pytest.raises(UserError, match=r"fails, on the problem '1\+1\?', raised TimeoutError"):
        graded([fails], TEXTS, ROWS)


UNFIT = {
    "verl's": (lambda solution_str, ground_truth: 1.0, "as verl's functions have"),
    "verl's whole": (
        lambda data_source, solution_str, ground_truth, extra_info=None: 1.0,
        "as verl's functions have",
    ),
    "one parameter": (lambda completion: 1.0, r"has the parameters \(completion\)"),
    "three": (lambda prompt, completion, answer: 1.0, r"\(prompt, completion, answer\)"),
    "a class, not its object": (type("Judge", (), {}), r"has the parameters \(\)"),
    "a model": (torch.nn.Linear(2, 2), "it must be a function"),
    "TRL's trainer": (lambda completions, trainer_state: [], "needs 'trainer_state'"),
    "TRL's ids": (lambda completion_ids, **_: [], "needs 'completion_ids'"),
    "TRL's log": (lambda completions, log_metric: [], "needs 'log_metric'"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_function_that_cannot_be_called_is_refused_before_any_rollout(name):
    function, said = UNFIT[name]
    with pytest.raises(UserError, match=said):
        verifier_of([function])
    assert verifier_of([lambda completions, trainer_state=None, log_metric=None: [1, 1]])


@pytest.mark.parametrize(
    "text, scores",
    [
        ("def grade(completions, answer):\n    return [float(a == '2') for a in answer]", (1, 0)),
        ("async def grade(completion, row):\n    return row['answer'] == '2'", (1, 0)),
        ("def grade(solution_str, ground_truth):\n    return 1.0", None),
        ("def grade(completion):\n    return 1.0", None),
    ],
)
def test_a_files_function_may_be_of_either_kind(text, scores, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    name = f"{tmp_path / 'mine.py'}:grade"
    if scores is not None:
        assert [score for score, _ in own_verifier(name)(TEXTS, ROWS)] == list(scores)
        return
    with pytest.raises(UserError, match=r"loss\.reward\.verifier"):
        own_verifier(name)
