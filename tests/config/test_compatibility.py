"""Options that go together, and what a config asks of its data. Those that do not are refused by
name: data/bad_inputs.txt."""

from copy import deepcopy
from fnmatch import fnmatch

import pytest
from helpers.training_cases import ROWS, write_rows
from transformers.training_args import OptimizerNames

from opsd.common.errors import UserError
from opsd.config import requirements
from opsd.config.load import merge, parse_config, with_overrides
from opsd.config.requirements import required_columns
from opsd.training.load_data import load_data

GOOD = {"model": {"path": "m"}, "data": {"source": "d.jsonl"}}
GRPO = {"method": "grpo", "rollout": {"group_size": 4}}
MODEL = {"teacher": {"policy": "model", "path": "t"}}
PEERS = {"prompts": {"teacher": "{{ problem }}{% if peers %}{{ peers[0].text }}{% endif %}"}}

MIX = {
    "teacher": {"mix": [{"context": "student"}, {"context": "c"}]},
    "eval": {"problems": 0},
}


def loss(**fields) -> dict:
    return {"loss": fields}


ALLOWED = [
    merge(GRPO, loss(kl=0.1, aggregation="rollout")),
    merge(GRPO, {**loss(credit=0.5, credit_steps=50), "teacher": {"policy": "live"}}),
    merge(GRPO, {**loss(credit=0.5), **PEERS}),
    loss(
        weights={"incorrect": 0.0}, reward={"verifier": "mine.py:grade", "success_threshold": 0.5}
    ),
    {**PEERS, **loss(divergence="sampled_token", epsilon_high=0.3)},
    {"method": "distill", **MODEL, **loss(divergence="reverse_kl", clip="token")},
    {"method": "distill", "teacher": {"mix": [{"path": "t"}, {"coefficient": 0.3}]}},
    merge(GRPO, {**loss(distil=0.5, kl=0.1), "teacher": {"mix": [{}, {"context": "student"}]}}),
    {"method": "sft", **loss(aggregation="rollout", weights={"maths": 2.0})},
    {"teacher": {"policy": "ema", "ema_decay": 0.0, "update_every": 50}},
    {"teacher": {"mix": [{"coefficient": [1, 0.3], "steps": 9}, {"context": "student"}]}},
    {"teacher": {"ema_decay": 0.9, "mix": [{"policy": "ema"}, {"policy": "model", "path": "t"}]}},
]


@pytest.mark.parametrize("values", ALLOWED)
def test_what_goes_together_is_taken(values):
    config = parse_config(merge(GOOD, values))
    assert parse_config(config.model_dump()) == config


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, ["problem", "solution", "answer"]),
        ({"eval": {"problems": 0}}, ["problem", "solution"]),
        ({"prompts": {"teacher": "{{ problem }} Be brief."}, "eval": {"problems": 0}}, ["problem"]),
        (merge(GRPO, {"eval": {"problems": 0}}), ["problem", "answer"]),
        (merge(MIX, {"prompts": {"contexts": {"c": "{{ answer }}"}}}), ["problem", "answer"]),
        (merge(MIX, {"prompts": {"contexts": {"c": "{{ peers }}"}}}), ["problem", "answer"]),
        (
            merge(GRPO, {"eval": {"problems": 0}, **loss(reward={"verifier": "v.py:grade"})}),
            ["problem"],
        ),
        (
            merge(GRPO, {"eval": {"problems": 0}, **loss(credit=0.5)}),
            ["problem", "solution", "answer"],
        ),
        ({"method": "sft", "eval": {"source": "e.jsonl"}}, ["problem", "solution"]),
        ({"method": "distill", **MODEL, "eval": {"problems": 0}}, ["problem"]),
    ],
)
def test_only_columns_that_are_used_must_be_there(values, wanted):
    assert required_columns(parse_config(merge(GOOD, values))) == wanted


def test_answers_that_only_their_own_text_equals_are_told(tmp_path):
    texts = {"problem": "p", "solution": "s", "answer": "1. 3\n2. 5"}
    rows = [*ROWS[:-1], ROWS[-1].__class__(*texts.values(), texts)]
    told = []
    for answers in (ROWS, rows):
        data = {"data": {"source": str(write_rows(tmp_path / "rows.jsonl", answers))}}
        values = {**data, **GRPO, "eval": {"problems": 0}}
        load_data(parse_config(merge(GOOD, values)), told.append)
    (said,) = told
    assert (
        said.startswith(f"1 of {len(rows)} answers looked at are read as text") and "2. 5" in said
    )


def test_answers_that_are_places_among_choices_are_refused(tmp_path):
    """MMLU's answer is 0 to 3."""
    values = {**GRPO, "eval": {"problems": 0}}
    words = ["four", "six", "seven"]
    for answer, choices, place in (
        (2, words, True), (2, ["1", "2", "3"], False), (2, [], False), (0, [], False),
    ):  # fmt: skip
        record = {"problem": "p?", "solution": "s", "answer": answer, "choices": choices}
        row = ROWS[0].__class__("p?", "s", str(answer), record)
        data = {"data": {"source": str(write_rows(tmp_path / "rows.jsonl", [row]))}}
        config = parse_config(merge(GOOD, {**data, **values}))
        if not place:
            assert len(load_data(config)[0]) == 1
            continue
        with pytest.raises(UserError, match="2 in row 1 is a place among its choices"):
            load_data(config)


def test_rows_without_a_solution_are_refused_where_one_is_needed(tmp_path):
    rows = [row.__class__(row.problem, "", row.answer, {"problem": row.problem}) for row in ROWS]
    data = {"data": {"source": str(write_rows(tmp_path / "rows.jsonl", rows))}}
    no_test = {"eval": {"problems": 0}}
    brief = parse_config(
        merge(GOOD, {**data, **no_test, "prompts": {"teacher": "{{ problem }} Be brief."}})
    )
    assert len(load_data(brief)[0]) == len(rows)
    with pytest.raises(UserError, match="solution"):
        load_data(parse_config(merge(GOOD, {**data, **no_test})))


def test_packages_are_asked_for_values_that_there_are(monkeypatch):
    """Of an optimizer by transformers' own list, of other fields by the config's."""
    monkeypatch.setattr(requirements, "find_spec", lambda package: None)
    for where, table in requirements.PACKAGES.items():
        for setting in table:
            field, _, form = setting.partition("=")
            named = [kind.value for kind in OptimizerNames if fnmatch(kind.value, form)]
            value = named[0] if field == "train.optimizer" else form.replace("?", "1")
            given = f"[{value}]" if field == "output.report_to" else value
            config = parse_config(with_overrides(deepcopy(GOOD), [f"{field}={given}"]))
            with pytest.raises(UserError, match=f"{field} is '{value}': it needs pip install"):
                requirements.check_packages(config, where)
