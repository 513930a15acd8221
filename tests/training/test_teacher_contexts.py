"""Teacher contexts made of rollouts: a successful peer, feedback; what is left out and counted."""

import pytest
from helpers.lines import read_lines
from helpers.training_cases import ROWS, quiet, short_config

from opsd.common.errors import UserError
from opsd.config.loss import LossSection
from opsd.config.sections import PromptsSection
from opsd.data.prompts import Context, Prompts
from opsd.data.rows import Row
from opsd.grading.rewards import GradedRollout
from opsd.objectives import OPSD, Problem
from opsd.quickstart import tiny_model as tiny
from opsd.rollout import Rollout
from opsd.training.run import train
from opsd.training.teacher_contexts import TeacherContexts

pytestmark = pytest.mark.usefixtures("no_report")

PEER = (
    "{% set right = peers | selectattr('correct') | list %}"
    "{% if right %}Q:{{ problem }}\nS:{{ right[0].text }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer()


def prompts(tokenizer, teacher: str = PEER) -> Prompts:
    return Prompts(PromptsSection(student=tiny.STUDENT_PROMPT, teacher=teacher), tokenizer)


def problem(tokenizer, *attempts: tuple[str, bool], row: Row = ROWS[0], feedback: str = ""):
    rollouts = [Rollout(tokenizer(text).input_ids, True) for text, _ in attempts]
    outcomes = [
        GradedRollout(text, True, float(right), right, "" if right else feedback)
        for text, right in attempts
    ]
    return Problem(row, Context([1], None), rollouts, outcomes)


def test_a_successful_peer_is_the_teachers_context(tokenizer):
    made = problem(tokenizer, ("1", False), ("22", True), ("3", True))
    lessons = TeacherContexts(prompts(tokenizer), None, False, pytest.fail)
    (taught,), measures = lessons([made])
    shown = [tokenizer.decode(context) for context in taught.teachers["teacher"]]
    assert [text.partition("S:")[2].partition("<")[0] for text in shown] == ["22", "3", "22"]
    assert measures == {"taught_fraction": 1.0, "too_long": 0}
    (group,), _ = OPSD(LossSection(), teacher=None).sample_groups([taught])
    assert [group.teachers[s.teacher] for s in group.samples] == taught.teachers["teacher"]
    assert group.student == [1] and len(group.teachers) == 2  # which both sees "22" is there once


def test_a_rollout_that_has_nothing_to_be_taught_is_left_out_and_counted(tokenizer):
    """The only right one has no right peer."""
    made = problem(tokenizer, ("1", False), ("22", True))
    (taught,), measures = TeacherContexts(prompts(tokenizer), None, False, pytest.fail)([made])
    assert [context is None for context in taught.teachers["teacher"]] == [False, True]
    (group,), logged = OPSD(LossSection(), teacher=None).sample_groups([taught])
    (sample,) = group.samples
    assert sample.weight == 1.0  # its one token is the step's only one
    assert measures["taught_fraction"] == 0.5 and logged == {"trained_fraction": 0.5}


def test_feedback_on_the_rollout_itself(tokenizer):
    template = "Q:{{ problem }}\n{{ rollout.feedback }}{{ rollout.text }}"
    made = problem(tokenizer, ("1", False), ("2", True), feedback="0;")
    (taught,), _ = TeacherContexts(prompts(tokenizer, template), None, False, pytest.fail)([made])
    first, second = (tokenizer.decode(context) for context in taught.teachers["teacher"])
    assert first.endswith("\n0;1<|end|><|assistant|>") and second.endswith(
        "\n2<|end|><|assistant|>"
    )


def test_contexts_that_do_not_fit_are_counted_and_named(tokenizer):
    made = problem(tokenizer, ("1", False), ("22" * 40, True))
    notes = []
    lessons = TeacherContexts(prompts(tokenizer), 80, True, notes.append)
    (taught,), measures = lessons([made])
    assert taught.teachers["teacher"] == [None, None] and measures["too_long"] == 1
    lessons([made])
    (note,) = notes
    assert ROWS[0].problem[:20] in note and "the model's window is 80" in note
    with pytest.raises(UserError, match=r"prompts.teacher: .*window is 80.*prompts.too_long: skip"):
        TeacherContexts(prompts(tokenizer), 80, False, notes.append)([made])


def test_a_column_of_the_same_name_is_refused(tokenizer):
    row = Row("1", "2", "3", {"problem": "1", "peers": ["x"]})
    made = problem(tokenizer, ("1", True), ("2", True), row=row)
    with pytest.raises(UserError, match="uses 'peers', which is a column"):
        TeacherContexts(prompts(tokenizer), None, False, pytest.fail)([made])


def test_a_template_without_rollouts_is_left_alone(tokenizer):
    made = problem(tokenizer, ("1", True))
    ordinary = TeacherContexts(prompts(tokenizer, tiny.TEACHER_PROMPT), None, False, pytest.fail)
    assert ordinary([made]) == ([made], {})


@pytest.mark.parametrize("policy", ["live", "ema"])
def test_a_run_learns_from_its_peers(policy, files, tmp_path):
    verifier = tmp_path / "mine.py"
    verifier.write_text(
        "def grade(completion, row):\n"
        "    right = completion[:1].isdigit()\n"
        "    return float(right), '' if right else 'a digit first'\n"
    )
    config = short_config(
        *files,
        tmp_path / "run",
        prompts={"teacher": PEER},
        teacher={"policy": policy},
        rollout={"group_size": 4},
        loss={"divergence": "reverse_kl", "reward": {"verifier": f"{verifier}:grade"}},
        train={"steps": 3, "save_every": 0},
        eval={"problems": 4, "samples": 1},
    )
    lines = read_lines(train(config, quiet()) / "metrics.jsonl")
    assert len(lines) == 3
    for line in lines:
        assert 0 < line["taught_fraction"] <= 1 and line["too_long"] == 0
        assert line["trained_tokens"] <= line["generated_tokens"] and line["divergence"] > 0
    assert any(line["taught_fraction"] < 1 for line in lines)
