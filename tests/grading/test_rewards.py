"""Rewards: verifiers, the user's own among them; formats, overlong rollouts, errors."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from helpers.lines import read_lines
from helpers.training_cases import ROWS, graded, quiet, short_config

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.config.load import save_config
from opsd.config.loss import LossSection, RewardSection
from opsd.data.prompts import Context
from opsd.grading.grader import Grader
from opsd.grading.rewards import (
    RewardFunction,
    check_code,
    make_verifier,
    overlong,
    own_verifier,
)
from opsd.objectives import Problem
from opsd.quickstart import tiny_model as tiny
from opsd.rollout import Rollout
from opsd.training.run import train
from opsd.training.teacher_contexts import informative, outcome_measures


def rewards(longest: int = 10, scores: list | None = None, **section) -> RewardFunction:
    """For the tiny tokenizer's texts, with a verifier that gives these scores."""

    def verifier(completions, rows):
        return scores or [(float("7" in text), "") for text in completions]

    return RewardFunction(RewardSection(**section), tiny.make_tokenizer(), verifier, longest)


def grade(function: RewardFunction, *texts: str) -> list:
    rollouts = [Rollout(function.tokenizer(text).input_ids, True) for text in texts]
    return function(rollouts, ROWS[: len(texts)])


def test_a_reward_is_score_format_and_length():
    function = rewards(longest=8, format=r"\d+", format_weight=0.25, overlong_buffer=4)
    right, wrong, long = grade(function, "7", "1+", "1=11=1")
    assert (right.reward, right.correct, right.formatted, right.text) == (1.25, True, True, "7")
    assert (wrong.reward, wrong.correct, wrong.formatted) == (0.0, False, False)
    assert (long.reward, long.correct) == (-0.5, False)


@pytest.mark.parametrize(
    ("length", "wanted"), [(1, 0.0), (6, 0.0), (7, -0.25), (8, -0.5), (10, -1.0)]
)
def test_overlong_falls_to_minus_one(length, wanted):
    assert overlong(length, longest=10, buffer=4) == wanted
    assert overlong(length, longest=10, buffer=None) == 0.0


def test_a_rollout_is_right_from_a_score_on():
    said = [(0.4, "nearly"), (0.6, "")]
    low, high = grade(rewards(success_threshold=0.5, scores=said), "1", "2")
    assert (low.correct, low.feedback, high.correct) == (False, "nearly", True)


def test_the_math_verifier_says_why():
    with Grader() as grader:
        verify = make_verifier(RewardSection(), grader)
        right, wrong = verify([r"so \boxed{2}", "so 3"], [ROWS[0].__class__("p", "s", "2", {})] * 2)
    assert right == (1.0, "") and wrong[0] == 0.0 and "boxed" in wrong[1]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return f"{path}:grade"


def test_the_users_own_verifier_sees_the_text_and_the_row(tmp_path):
    name = write(
        tmp_path / "mine.py",
        "def grade(completion, row):\n"
        "    assert row['worked'] and row['problem'] and row['answer']\n"
        "    return len(completion) / 10, 'too short' if len(completion) < 3 else ''\n",
    )
    assert own_verifier(name)(["12", "12345"], ROWS[:2]) == [
        (0.2, "too short"),
        (0.5, ""),
    ]
    bare = write(tmp_path / "bare.py", "def grade(completion, row):\n    return True\n")
    assert own_verifier(bare)(["1"], ROWS[:1]) == [(1.0, "")]


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("raise KeyError('x')", "raised KeyError: 'x'"),
        ("return None", "returned None: it must return a finite number"),
        ("return 'right'", "returned 'right'"),
        ("return float('nan')", "returned nan"),
        ("return 1, 2", "its feedback must be a text"),
    ],
)
def test_a_verifier_that_fails_is_named_with_its_problem(body, wanted, tmp_path):
    name = write(tmp_path / "mine.py", f"def grade(completion, row):\n    {body}\n")
    with pytest.raises(UserError) as raised:
        own_verifier(name)(["1"], ROWS[:1])
    message = str(raised.value)
    assert wanted in message and name in message and ROWS[0].problem[:10] in message


def test_the_file_of_a_verifier_runs_once(tmp_path):
    loads = tmp_path / "loads"
    note = f"with open({str(loads)!r}, 'a') as f: f.write('x')"
    name = write(tmp_path / "mine.py", f"{note}\ndef grade(c, r): return 1\n")
    section = LossSection(reward={"verifier": name})
    check_code(section, verifier=True)
    make_verifier(section.reward, None)
    assert loads.read_text() == "x"


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("maths", None, "may be 'math' or FILE.py:FUNCTION"),
        ("{dir}/none.py:grade", None, "there is no file"),
        ("{dir}/mine.py:score", "def grade(c, r): return 1", "has no function 'score'"),
        ("{dir}/mine.py:score", "def grade(c, r): return 1", "did you mean {dir}/mine.py:grade?"),
        ("{dir}/mine.py", "def grade(c, r): return 1", "did you mean {dir}/mine.py:grade?"),
        ("{dir}/mine.grade", "def grade(c, r): return 1", "did you mean '{dir}/mine.py:grade'?"),
        ("{dir}/mine:grade", "def grade(c, r): return 1", "did you mean '{dir}/mine.py:grade'?"),
        (
            "{dir}/mine.py:grade",
            "import nowhere\ndef grade(c, r): ...",
            "with ModuleNotFoundError",
        ),
        ("{dir}/mine.py:grade", "def (", "is not Python (SyntaxError"),
    ],
)
def test_a_verifier_that_cannot_be_loaded_is_refused_before_the_weights(
    name, text, wanted, files, tmp_path, capsys, monkeypatch
):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    monkeypatch.setattr(
        "opsd.training.run.load_model", lambda *_, **__: pytest.fail("weights loaded")
    )
    config = short_config(
        *files,
        tmp_path / "run",
        method="grpo",
        rollout={"group_size": 2},
        loss={"reward": {"verifier": name.format(dir=tmp_path)}},
    )
    save_config(config, tmp_path / "c.yaml")
    assert main(["train", str(tmp_path / "c.yaml")]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "loss.reward.verifier" in message and wanted.format(dir=tmp_path) in message


def test_a_function_that_its_file_lacks_is_told_in_python_too(tmp_path):
    (tmp_path / "mine.py").write_text("def grade(c, r): return 1")
    with pytest.raises(UserError, match=r"no function 'score'; did you mean .*mine\.py:grade\?"):
        own_verifier(f"{tmp_path}/mine.py:score")


@pytest.mark.parametrize(
    ("head", "wanted"),
    [
        ("def grade(text: Text):", "has the parameters (text): it is called with a completion and"),
        ("async def grade(solution_str, ground_truth):", "as verl's functions have"),
        ("def grade(completions, trainer_state, **columns):", "needs 'trainer_state'"),
        ("def grade(completion, row: Row, *, scale=none.scale):", None),
        ("def grade(prompts, completions, log_metric=none, **columns):", None),
        ("@none.wrapped\ndef grade(text):", None),  # what it takes is not known
    ],
)
def test_a_dry_run_knows_a_verifiers_parameters_without_running_its_file(head, wanted, tmp_path):
    name = write(tmp_path / "mine.py", f"{head} ...\nraise SystemExit(7)\n")
    section = LossSection(reward={"verifier": name})
    with nullcontext() if wanted is None else pytest.raises(UserError, match=re.escape(wanted)):
        check_code(section, verifier=True, run=False)


@pytest.mark.parametrize("run", [False, True])
def test_a_gates_parameters_are_checked_before_the_first_step(run, tmp_path):
    name = write(tmp_path / "mine.py", "def grade(measures): ...\nfrom torch import mul\n")
    with pytest.raises(UserError, match=r"\(measures\): it is called with the measures and the"):
        check_code(LossSection(gates=[{"gate": name}]), verifier=False, run=run)
    mul = name.replace(":grade", ":mul")  # written in C, without a signature
    check_code(LossSection(gates=[{"gate": mul}]), verifier=False, run=run)


def test_a_run_learns_from_the_users_verifier_and_logs_it(files, tmp_path):
    name = write(
        tmp_path / "mine.py",
        "def grade(completion, row):\n"
        "    return sum(c.isdigit() for c in completion) / 6, 'more digits'\n",
    )
    config = short_config(
        *files,
        tmp_path / "run",
        method="grpo",
        rollout={"group_size": 4},
        loss={"reward": {"verifier": name, "success_threshold": 0.5}},
        train={"steps": 2, "save_every": 0},
        eval={"problems": 0},
    )
    lines = read_lines(train(config, quiet()) / "metrics.jsonl")
    for line in lines:
        assert 0 < line["reward"] < 1 and 0 <= line["correct_fraction"] <= line["pass_at_k"] <= 1
        assert line["informative_groups"] > 0 and line["grad_norm"] > 0


def test_a_verifier_that_raises_in_a_run_is_one_line(files, tmp_path, capsys):
    name = write(tmp_path / "mine.py", "def grade(completion, row):\n    return 1 / 0\n")
    config = short_config(
        *files, tmp_path / "run", loss={"reward": {"verifier": name, "log": True}}
    )
    save_config(config, tmp_path / "c.yaml")
    assert main(["train", str(tmp_path / "c.yaml")]) == 1
    assert "raised ZeroDivisionError" in capsys.readouterr().err.splitlines()[-1]


def test_rollouts_are_graded_for_the_logs_sake(files, tmp_path):
    config = short_config(
        *files,
        tmp_path / "run",
        loss={"reward": {"log": True}},
        train={"steps": 1, "save_every": 0},
        eval={"problems": 0},
    )
    (line,) = read_lines(train(config, quiet()) / "metrics.jsonl")
    assert line["pass_at_k"] == line["correct_fraction"] == 0.0 and line["divergence"] > 0


def test_measures_of_a_group():
    problems = [Problem(row, Context([1], [1]), [Rollout([1], True)] * 2) for row in ROWS[:2]]
    assert outcome_measures(problems) == {}
    problems = graded(problems, [1.0, 0.0, 0.5, 0.5])
    assert outcome_measures(problems)["pass_at_k"] == 0.5
    assert [informative(problem) for problem in problems] == [True, False]
