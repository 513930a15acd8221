import random
import re

import pytest

from opsd.quickstart import chain_sum
from opsd.quickstart.chain_sum import (
    HELD_OUT_SEED,
    evaluate,
    in_words,
    make_chain_sum,
    make_rows,
    number_in_words,
    own_style,
    reasoning_gym_expression,
)
from opsd.quickstart.settings import settings

DIGITS = re.compile(r"\d")


def expressions(rows):
    return [row.columns["expression"] for row in rows]


def test_own_style_shows_each_step_and_boxes_the_answer():
    assert own_style("4 - 1 - 7") == r"4 - 1 = 3, 3 - 7 = -4. The answer is \boxed{-4}."


def test_words_say_the_same_steps(monkeypatch):
    for name, words in {
        "negative": ("minus",),
        "makes": ("makes",),
        "minus": ("minus",),
        "join": ("; ",),
        "open": ("",),
        "close": ("So the answer is",),
    }.items():
        monkeypatch.setitem(chain_sum.WORDS, name, words)
    words = "Four minus one makes three; three minus seven makes minus four. So the answer is "
    assert in_words("4 - 1 - 7", random.Random(0)) == words + r"\boxed{-4}."


def test_words_differ_from_call_to_call_and_show_no_digit_but_the_answer():
    rng = random.Random(0)
    texts = [in_words("8 - 9 + 3 - 5", rng) for _ in range(40)]
    assert len(set(texts)) > 30
    for text in texts:
        working, answer = text.split(r"\boxed")
        assert answer == "{-3}."
        assert not DIGITS.search(working)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (20, "twenty"),
        (36, "thirty-six"),
        (-27, "minus twenty-seven"),
    ],
)
def test_numbers_in_words(number, text):
    assert number_in_words(number) == text


def test_expressions_are_those_that_reasoning_gym_draws():
    from reasoning_gym import create_dataset

    one_digit = {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 1}
    for seed in (0, 7, 2**40 - 3):
        theirs = create_dataset("chain_sum", seed=seed, size=300, **one_digit)
        ours = [reasoning_gym_expression(seed + i) for i in range(300)]
        assert ours == [item["metadata"]["expression"] for item in theirs]


def test_rows_are_right_and_what_reasoning_gym_makes():
    for row in make_rows(3, 200):
        expression = row.problem
        assert re.fullmatch(r"\d( [+-] \d){2,3}", expression)
        # An independent evaluation: Python's own.
        assert row.answer == str(eval(expression)) == str(evaluate(expression))
        assert row.solution.endswith(rf"\boxed{{{row.answer}}}.")
        assert row.columns["solution"] == row.solution


def test_no_expression_is_in_two_sets_or_twice_in_one():
    sets = make_chain_sum(5, cold_start=448, train=1300, held_out=500)
    cold = expressions(sets.cold_start)
    everything = cold + expressions(sets.train) + expressions(sets.held_out)
    assert len(everything) == 448 + 1300 + 500
    assert len(set(everything)) == len(everything)


def test_a_seed_decides_everything_but_the_held_out_problems():
    first, again, other = (
        make_chain_sum(seed, cold_start=20, train=50, held_out=50) for seed in (1, 1, 2)
    )
    assert first == again
    assert first.held_out == other.held_out
    assert not set(expressions(first.train)) & set(expressions(other.train[:5]))
    assert first.held_out == make_rows(HELD_OUT_SEED, 50)


def test_neighbouring_seeds_have_different_problems():
    ones, twos = set(expressions(make_rows(1, 100))), set(expressions(make_rows(2, 100)))
    assert len(ones & twos) < 10  # by chance a few; reasoning-gym's own neighbours share 99


def test_prompts_start_alike_and_only_the_teachers_shows_the_solution():
    prompts = settings("smollm2")[0]["prompts"]
    assert prompts["teacher"].startswith(prompts["student"])
    assert "{{ problem }}" in prompts["student"]
    assert "{{ solution }}" not in prompts["student"]
    assert "{{ solution }}" in prompts["teacher"]
