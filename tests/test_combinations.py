"""Options that do not go together are refused by name, and what a config asks of its data."""

import pytest
from training_cases import ROWS, write_rows

from opsd.config import parse_config
from opsd.errors import UserError
from opsd.needs import required_columns
from opsd.quickstart.recipe import merge
from opsd.train import load_data

GOOD = {"model": {"path": "m"}, "data": {"source": "d.jsonl"}}
GRPO = {"method": "grpo", "rollout": {"per_problem": 4}}
MODEL = {"teacher": {"policy": "model", "path": "t"}}
PEERS = {"prompts": {"teacher": "{{ problem }}{% if peers %}{{ peers[0].text }}{% endif %}"}}


def loss(**fields) -> dict:
    return {"loss": fields}


REFUSED = [
    # What a method has no use for.
    (merge(GRPO, loss(divergence="jsd")), "loss.divergence is 'jsd'", "opsd and distill"),
    (merge(GRPO, loss(clip="token")), "loss.clip is 'token'", "not for grpo"),
    (merge(GRPO, loss(roles=["teacher"])), "loss.roles is ['teacher']", "for sft"),
    (loss(kl=0.1), "loss.kl is 0.1", "for grpo, not for opsd"),
    (loss(credit=0.5), "loss.credit is 0.5", "for grpo"),
    (loss(scale_advantages=False), "loss.scale_advantages is False", "for grpo"),
    ({"method": "sft", **loss(temperature=0.5)}, "loss.temperature is 0.5", "not for sft"),
    (
        {"method": "sft", **loss(reward={"log": True})},
        "loss.reward is {'log': True}",
        "not for sft",
    ),
    (
        {"method": "sft", **loss(weights={"correct": 0})},
        "loss.weights.correct is 0.0",
        "no rollouts",
    ),
    ({"rollout": {"resample": 2}}, "rollout.resample is 2", "opsd"),
    # What another option makes useless.
    (loss(beta=0.3), "loss.beta is 0.3", "'jsd', not 'forward_kl'"),
    (loss(clip_threshold=0.3), "loss.clip_threshold is 0.3", "loss.clip is 'none'"),
    (loss(epsilon_high=0.3), "loss.epsilon_high is 0.3", "sampled_token"),
    (merge(GRPO, loss(credit_clip=0.1)), "loss.credit_clip is 0.1", "without loss.credit"),
    (merge(GRPO, loss(credit_steps=9)), "loss.credit_steps is 9", "without loss.credit"),
    ({"teacher": {"ema_decay": 0.5}}, "teacher.ema_decay is 0.5", "'ema', not 'initial'"),
    ({"teacher": {"update_every": 5}}, "teacher.update_every is 5", "'ema', not 'initial'"),
    (loss(reward={"correct_at": 0.5}), "loss.reward.correct_at is 0.5", "grades no rollouts"),
    (loss(reward={"format": "x", "log": True}), "loss.reward.format is 'x'", "grpo's reward"),
    # What cannot be.
    (
        {"train": {"sharding": "zero2"}, "model": {"path": "m", "lora": {}}},
        "train.sharding is 'zero2'",
        "small (allowed: none, fsdp2)",
    ),
    (
        {"train": {"sharding": "zero1", "optimizer": "adafactor"}},
        "train.optimizer is 'adafactor'",
        "flat pieces",
    ),
    (loss(divergence="sampled_token", clip="token"), "loss.clip is 'token'", "sampled_token"),
    (loss(divergence="sampled_token", temperature=0.7), "loss.temperature is 0.7", "as they are"),
    (
        merge(loss(divergence="sampled_token"), {"rollout": {"source": "reference"}}),
        "rollout.source is 'reference'",
        "student's own rollouts",
    ),
    (
        merge(loss(weights={"incorrect": 0}), {"rollout": {"source": "reference"}}),
        "rollout.source is 'reference'",
        "need rollouts",
    ),
    (loss(weights={"correct": 0, "incorrect": 0}), "loss.weights.correct is 0.0", "nothing"),
    (
        merge(GRPO, {**loss(kl=0.1), "teacher": {"policy": "live"}}),
        "loss.kl is 0.1",
        "the student itself",
    ),
    (merge(GRPO, loss(epsilon_high=0.1)), "loss.epsilon_high is 0.1", "at least loss.epsilon"),
    (
        merge(GRPO, loss(reward={"overlong_buffer": 2000})),
        "loss.reward.overlong_buffer is 2000",
        "rollout.max_new_tokens (1024)",
    ),
    (
        {"train": {"mini_batches": 3, "problems_per_step": 2}},
        "train.mini_batches is 3",
        "train.problems_per_step (2)",
    ),
    # Templates over rollouts.
    ({"prompts": {"student": "{{ peers }}"}}, "prompts.student uses", "before there are rollouts"),
    ({"prompts": {"target": "{{ rollout }}"}}, "prompts.target uses", "only prompts.teacher may"),
    ({"method": "sft", **PEERS}, "prompts.teacher uses", "sft"),
    ({"method": "distill", **MODEL, **PEERS}, "prompts.teacher uses", "distill"),
    (merge(GRPO, PEERS), "prompts.teacher uses", "grpo"),
    ({**PEERS, "eval": {"teacher": True}}, "eval.teacher is true", "held-out"),
    ({**PEERS, "rollout": {"source": "teacher"}}, "rollout.source is 'teacher'", "written them"),
]


@pytest.mark.parametrize(("values", "name", "why"), REFUSED)
def test_what_does_not_go_together_is_refused_by_name(values, name, why):
    with pytest.raises(UserError) as raised:
        parse_config(merge(GOOD, values))
    assert name in str(raised.value) and why in str(raised.value)


ALLOWED = [
    merge(GRPO, loss(kl=0.1, normalise="rollout")),
    merge(GRPO, {**loss(credit=0.5, credit_steps=50), "teacher": {"policy": "live"}}),
    merge(GRPO, {**loss(credit=0.5), **PEERS}),
    loss(weights={"incorrect": 0.0}, reward={"verifier": "mine.py:grade", "correct_at": 0.5}),
    {**PEERS, **loss(divergence="sampled_token", epsilon_high=0.3)},
    {"method": "distill", **MODEL, **loss(divergence="reverse_kl", clip="token")},
    {"method": "sft", **loss(normalise="rollout", weights={"maths": 2.0})},
    {"teacher": {"policy": "ema", "ema_decay": 0.0, "update_every": 50}},
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
