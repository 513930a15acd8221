"""Teacher contexts made of rollouts: a successful peer, feedback; what is left out and counted;
a majority's answer in the place of a solution."""

import json
from dataclasses import replace

import pytest
from helpers.lines import read_lines
from helpers.training_cases import ROWS, quiet, short_config, write_rows

from opsd.common.errors import UserError
from opsd.config.load import merge, parse_config
from opsd.config.loss import LossSection, RewardSection
from opsd.config.sections import PromptsSection
from opsd.data.prompts import Context, Prompts
from opsd.data.rows import Row
from opsd.grading import rewards
from opsd.grading.grader import Grader
from opsd.grading.rewards import GradedRollout, RewardFunction
from opsd.objectives import OPSD, Problem
from opsd.quickstart import tiny_model as tiny
from opsd.quickstart.worksheet import worksheet_rows
from opsd.rollout import Rollout
from opsd.training.load_data import fitting_data
from opsd.training.run import train
from opsd.training.teacher_contexts import TeacherContexts, graded

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


MAJORITY = "Q:{{ problem }}\nS:{{ solution }}"


def says(monkeypatch, *texts: str) -> None:
    """Rollouts say the text of their first token's number: the tiny tokenizer has no boxes."""
    monkeypatch.setattr(
        rewards, "completions", lambda _, rollouts, keep: [texts[r.ids[0]] for r in rollouts]
    )


def shown_solution(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids).partition("S:")[2].replace("<|pad|>", "").partition("<")[0]


def test_the_majority_is_the_solution_of_a_row_that_has_none(tokenizer, monkeypatch):
    """Equal for all rollouts, so there once; another row keeps its own, one with a tie has none."""
    section = PromptsSection(student=tiny.STUDENT_PROMPT, teacher=MAJORITY, majority=0.5)
    shown = Prompts(section, tokenizer)
    bare = Row(ROWS[0].problem, "", "", {})
    says(monkeypatch, r"\boxed{12}", "1", r"\boxed{12.0}", r"\boxed{2}")
    problems = [
        Problem(row, Context([1], None), [Rollout([number], True) for number in numbers])
        for numbers, row in zip(([0, 1, 2], [1, 3], [3, 0]), (bare, ROWS[1], bare), strict=True)
    ]
    with Grader() as grader:
        votes = RewardFunction(RewardSection(), tokenizer, None, 9, grader=grader, agreement=0.5)
        voted = graded(problems, votes, shown.unsolved)
    assert [p.majority and p.majority.answer for p in voted] == ["12", None, ""]
    assert all(p.outcomes is None for p in voted)
    made, measures = TeacherContexts(shown, None, False, pytest.fail)(voted)
    solutions = [
        [ids and shown_solution(tokenizer, ids) for ids in p.teachers["teacher"]] for p in made
    ]
    assert solutions == [["12"] * 3, [ROWS[1].solution.strip()] * 2, [None, None]]
    assert measures == {
        "taught_fraction": 5 / 7,
        "too_long": 0,
        "majority_fraction": 0.5,
        "majority_unanswered": 0.0,
        "majority_tied": 0.5,
        "majority_unsure": 0.0,
        "majority_share": pytest.approx((2 / 3 + 1 / 2) / 2),
    }
    groups, _ = OPSD(LossSection(), teacher=None).sample_groups(made)
    assert [len(group.teachers) for group in groups] == [1, 1]


@pytest.mark.parametrize("answer", [None, "1.0"])
def test_a_majority_needs_no_column_of_solutions(answer, files, tmp_path, monkeypatch):
    """Nor one of answers, but to evaluate: by the held-out rows' own. Where there is one, the log
    says whether the majority is right."""
    given = [answer and [answer, "7"][number % 2] for number in range(len(ROWS))]
    lines = [{"problem": r.problem, "answer": own} for r, own in zip(ROWS, given, strict=True)]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_rows(tmp_path / "held.jsonl", worksheet_rows(4, seed=99))
    config = short_config(
        files[0],
        tmp_path / "bare.jsonl",
        tmp_path / "run",
        prompts={"majority": 0.6},
        rollout={"group_size": 3, "max_new_tokens": 12},
        eval={"source": str(tmp_path / "held.jsonl"), "problems": 4},
    )
    monkeypatch.setattr(
        rewards,
        "completions",
        lambda _, rollouts, keep: [rf"\boxed{{{max(1, n)}}}" for n in range(len(rollouts))],
    )
    lines = read_lines(train(config, quiet()) / "metrics.jsonl")
    assert len(lines) == 4
    right = [line["majority_correct"] for line in lines if "majority_correct" in line]
    assert len(right) == (4 if answer else 0) and all(0 <= share <= 1 for share in right)
    assert not answer or 0 < sum(right) / 4 < 1
    for line in lines:
        assert (line["majority_fraction"], line["taught_fraction"]) == (1.0, 1.0)
        assert line["majority_share"] == pytest.approx(2 / 3) and line["divergence"] > 0
    assert all(
        line["accuracy"] is not None for line in read_lines(tmp_path / "run/evaluations.jsonl")
    )


@pytest.mark.parametrize("majority", [None, 0.5])
def test_a_row_without_a_solution_holds_the_student(majority, tokenizer, monkeypatch):
    """The teacher sees the student's own context, with its system message; not where rollouts
    agree on an answer."""
    section = PromptsSection(
        student=tiny.STUDENT_PROMPT,
        teacher=MAJORITY,
        teacher_system="12",
        majority=majority,
        hold=True,
    )
    shown = Prompts(section, tokenizer)
    bare = Row(ROWS[0].problem, "", "", {})
    says(monkeypatch, r"\boxed{12}", r"\boxed{12.0}", r"\boxed{2}")
    rows, numbers = (bare, ROWS[1], bare), ([0, 1], [0, 2], [0, 2])
    problems = [
        Problem(row, context, [Rollout([number], True) for number in own])
        for row, context, own in zip(rows, shown.contexts(rows), numbers, strict=True)
    ]
    with Grader() as grader:
        votes = RewardFunction(RewardSection(), tokenizer, None, 9, grader=grader, agreement=0.5)
        made = graded(problems, votes if majority else None, shown.unsolved)
    made, _ = TeacherContexts(shown, None, False, pytest.fail)(made)
    student = shown.ids(bare, "student")
    for number, p in enumerate(made):
        held = number == 2 or (number == 0 and majority is None)
        its = p.teacher_contexts()
        assert its[0] == its[1] and (its[0] == student) == held
        assert held or shown_solution(tokenizer, its[0]) == (
            ROWS[1].solution.strip() if number else "12"
        )


def test_a_held_student_stays_where_it_is(files, tmp_path):
    """By the teacher of step 0 it has nothing to learn there; one row has a solution."""
    lines = [{"problem": row.problem} for row in ROWS]
    config = short_config(
        files[0],
        tmp_path / "rows.jsonl",
        tmp_path / "run",
        prompts={"hold": True},
        train={"steps": 2},
        eval={"problems": 0},
    )
    for solutions in (0, len(ROWS)):
        for line, row in zip(lines[:solutions], ROWS, strict=False):
            line["solution"] = row.solution
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        config.output.dir = str(tmp_path / f"run-{solutions}")
        measured = read_lines(train(config, quiet()) / "metrics.jsonl")
        assert all((line["divergence"] < 1e-6) == (solutions == 0) for line in measured)


@pytest.mark.parametrize(
    ("changes", "varied", "told"),
    [
        ({}, 12, "4 problems, each visited some 11 times: 12 with other numbers hold"),
        ({"train": {"steps": 13}}, 0, None),  # 9.75 visits
        ({"data": {"varied": 5}}, 20, "20 with other numbers hold"),
        ({"data": {"varied": 0}}, 0, "see prompts.hold in docs/methods.md"),
        ({"loss": {"reward": {"log": True}}}, 12, "12 with other numbers hold"),
        ({"loss": {"weights": {"incorrect": 2.0}}}, 0, "see prompts.hold"),
        ({"method": "grpo", "rollout": {"group_size": 2}}, 0, None),
    ],
)
def test_few_problems_are_held_by_variations(changes, varied, told, tokenizer, files, tmp_path):
    """The teacher sees there what the student sees. With a row that holds already nothing is added
    and nothing told."""
    config = short_config(*files, tmp_path, train={"steps": 15})
    config = parse_config(merge(config.model_dump(exclude_unset=True), changes))
    shown, notes = Prompts(config.prompts, tokenizer), []
    display = quiet()
    display.note = notes.append
    rows, _ = fitting_data(config, ROWS[:4], [], shown, None, display)
    others = rows[4:]
    assert rows[:4] == ROWS[:4] and len(others) == varied
    for row in others:
        context = shown.context(row)
        assert context.teacher == context.student and row.problem in tokenizer.decode(
            context.student
        )
    assert all(context.teacher != context.student for context in shown.contexts(rows[:4]))
    said = [note for note in notes if "visited" in note]
    assert len(said) == (told is not None) and all(told in note for note in said)
    for row in others[:1]:  # one that is held out is not trained on
        asked = [replace(row, held=False)]
        assert fitting_data(config, ROWS[:4], asked, shown, None, quiet())[0][4:] == others[1:]


def test_problems_that_cannot_vary_are_told(tokenizer, files, tmp_path):
    """So are 256 problems not few, and rows that hold the student are enough."""
    config = short_config(*files, tmp_path, train={"steps": 4000}, prompts={"hold": True})
    config = parse_config(config.model_dump(exclude_unset=True))
    shown = Prompts(config.prompts, tokenizer)
    plain = [Row(text, "a solution of theirs", "b", {}) for text in ("one", "two", "six")]
    many, bare = worksheet_rows(256, seed=1), Row("none", "", "", {})
    with pytest.raises(UserError, match=r"data\.source has 0 training rows"):
        fitting_data(config, [], [], shown, None, quiet())
    for rows, told in ((plain, True), ([*plain, bare], False), (many, False), (many[1:], True)):
        display, notes = quiet(), []
        display.note = notes.append
        made, _ = fitting_data(config, rows, [], shown, None, display)
        assert (len(made) > len(rows)) == (rows == many[1:])
        assert any("visited" in note for note in notes) == told, notes


def test_few_problems_train_at_a_falling_rate(files, tmp_path):
    data, rates = write_rows(tmp_path / "few.jsonl", ROWS[:3]), {}
    how = {"train": {"steps": 11}, "eval": {"problems": 0}}
    for varied in (None, 0):
        place = tmp_path / f"run-{varied}"
        config = short_config(files[0], data, place, **how, data={"varied": varied})
        lines = read_lines(train(config, quiet()) / "metrics.jsonl")
        rates[varied] = [line["learning_rate"] for line in lines]
    assert rates[0] == [1e-3] * 11
    assert rates[None] == pytest.approx([1e-3 * (11 - step) / 11 for step in range(11)])


@pytest.mark.parametrize(("steps", "more"), [(4, 11), (11, 12)])
def test_more_steps_never_change_the_rows_or_the_rate_of_a_run(steps, more, files, tmp_path):
    """4 steps of 3 rows hold nobody, 11 do; the rate of 11 falls to step 11."""
    data, run = write_rows(tmp_path / "few.jsonl", ROWS[:3]), tmp_path / "run"
    how = {"eval": {"problems": 0}, "train": {"steps": steps, "save_every": 1}}
    train(short_config(files[0], data, run, **how), quiet())
    how["train"]["steps"] = more
    with pytest.raises(UserError, match=f"train.steps is {more}, and was {steps}: data.varied"):
        train(short_config(files[0], data, run, **how), quiet(), resume=True)
    config = short_config(files[0], data, tmp_path / "none", **how, data={"varied": 0})
    config.train.steps = steps
    train(config, quiet())
    config.train.steps = more
    assert len(read_lines(train(config, quiet(), resume=True) / "metrics.jsonl")) == more


def test_only_problems_with_an_answer_are_graded_for_the_log(files, tmp_path):
    """A verifier is never given a problem that the run made, nor no problem at all."""
    data = write_rows(tmp_path / "few.jsonl", ROWS[:3])
    verifier = tmp_path / "verifier.py"
    verifier.write_text(
        "def grade(completions, answer, **_):\n    return [1 / all(answer)] * len(answer)"
    )
    config = short_config(
        *(files[0], data, tmp_path / "run"),
        train={"steps": 11},
        eval={"problems": 0},
        loss={"reward": {"log": True, "verifier": f"{verifier}:grade"}},
    )
    run = train(config, quiet())
    lines, known = read_lines(run / "rollouts.jsonl"), {row.problem for row in ROWS[:3]}
    assert {line["problem"] in known for line in lines} == {True, False}
    assert all(("reward" in line) == (line["problem"] in known) for line in lines)
    assert {line["step"] for line in lines} > {line["step"] for line in lines if "reward" in line}
    graded = {line["step"] for line in lines if "reward" in line}
    measured = read_lines(run / "metrics.jsonl")
    assert graded == {line["step"] for line in measured if line.get("reward") == 1.0}


def test_a_template_may_need_the_solution_that_a_held_row_lacks(tokenizer, files, tmp_path):
    teacher = tiny.TEACHER_PROMPT + "{{ answer.split(';')[3] }}"
    changes = {"train": {"steps": 15}, "prompts": {"teacher": teacher}}
    config = short_config(*files, tmp_path, **changes)
    shown = Prompts(config.prompts, tokenizer)
    rows, _ = fitting_data(config, ROWS[:4], [], shown, 200, quiet())
    assert len(rows) == 16
    assert [c.teacher == c.student for c in shown.contexts(rows)] == [False] * 4 + [True] * 12
