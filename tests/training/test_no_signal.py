"""A run that learns nothing, or blows up, says so in one line with its likely cause."""

import shutil

import pytest
from helpers.lines import read_lines
from helpers.training_cases import short_config, timeless

from opsd.cli.main import main
from opsd.config.load import save_config
from opsd.training.no_signal import NoSignalWatch

pytestmark = pytest.mark.usefixtures("no_report")

HEALTHY = {
    "method": "opsd",
    "loss": 0.1,
    "grad_norm": 0.5,
    "divergence": 0.1,
    "student_entropy": 1.0,
    "truncated_fraction": 0.5,
}
GRPO = {**HEALTHY, "method": "grpo", "divergence": None, "informative_groups": 0.5}
SIGNS = {
    "equal_rewards": ({**GRPO, "informative_groups": 0, "correct_fraction": 0.0}, "no rollout is"),
    "zero_gradient": ({**HEALTHY, "grad_norm": 0.0}, "loss.weights"),
    "zero_divergence": ({**HEALTHY, "divergence": 0.0}, "prompts.teacher"),
    "still_weights": ({**HEALTHY, "still": 1.0}, "train.learning_rate"),
    "all_cut": ({**HEALTHY, "truncated_fraction": 1.0}, "rollout.max_new_tokens"),
}


@pytest.mark.parametrize("name", SIGNS)
def test_a_sign_is_told_once_after_some_steps(name):
    line, cause = SIGNS[name]
    watch = NoSignalWatch(3)
    told = [watch(line) for _ in range(6)]
    assert [set(found) for found in told] == [set(), set(), {name}, set(), set(), set()]
    assert cause in told[2][name] and told[2][name].startswith("for 3 steps ")


@pytest.mark.parametrize("name", SIGNS)
def test_one_good_step_starts_the_count_again(name):
    line, _ = SIGNS[name]
    good = GRPO if line["method"] == "grpo" else HEALTHY
    watch = NoSignalWatch(3)
    assert not any(watch(step) for step in [line, line, good, line, line])


def test_too_easy_is_told_from_too_hard():
    watch = NoSignalWatch(1)
    easy = {**GRPO, "informative_groups": 0, "correct_fraction": 1.0}
    assert "too easy" in watch(easy)["equal_rewards"]


def test_a_rate_that_is_too_high_is_seen_in_the_divergence():
    """The shape of a run at a rate of 5: from 1.9e-4 to 1 124 in six steps."""
    watch = NoSignalWatch(5)
    values = [1.9e-4, 0.8, 42.0, 310.0, 700.0, 1124.0]
    told = [watch({**HEALTHY, "divergence": value}) for value in values]
    assert [list(found) for found in told] == [[], [], ["rising_divergence"], [], [], []]
    assert "train.learning_rate" in told[2]["rising_divergence"]


def test_sfts_loss_counts_and_a_policy_gradients_does_not():
    sft = {"method": "sft", "divergence": None, "grad_norm": 1.0}
    watch = NoSignalWatch(5)
    watch({**sft, "loss": 1.2})
    assert "rising_loss" in watch({**sft, "loss": 9.0})
    watch = NoSignalWatch(5)
    watch({**GRPO, "loss": 0.0})
    assert not watch({**GRPO, "loss": 9.0})


def test_a_healthy_run_and_one_without_patience_say_nothing():
    watch = NoSignalWatch(2)
    assert not any(watch(step) for step in [HEALTHY, GRPO] * 5)
    silent = NoSignalWatch(0)
    assert not any(silent(SIGNS["all_cut"][0]) for _ in range(9))


def test_a_resumed_run_says_nothing_twice():
    line, _ = SIGNS["all_cut"]
    assert not NoSignalWatch(3, [line] * 3)(line)
    assert NoSignalWatch(3, [line] * 2)(line)


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"max_grad_norm": 1e-30}, True),
        ({"learning_rate": 1e-12}, True),
        ({"learning_rate": 1e-12, "warmup_steps": 3}, False),
        ({"learning_rate": 1e-7}, False),
    ],
)
def test_weights_that_stay_as_they_are_are_told(train, says, files, tmp_path, capsys):
    train |= {"steps": 4, "save_every": 2, "collapse": {"no_signal": 2}}
    config = short_config(*files, tmp_path / "run", train=train, eval={"problems": 0})
    save_config(config, tmp_path / "c.yaml")
    assert main(["train", str(tmp_path / "c.yaml")]) == 0
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line.get("collapse") for line in lines].count(["still_weights"]) == says
    assert ("no weight has moved (train.learning_rate" in capsys.readouterr().out) == says
    # Resumed, it compares with the same beginning.
    for name in ("checkpoint-4", "model"):
        shutil.rmtree(tmp_path / "run" / name)
    assert main(["train", str(tmp_path / "run"), "--resume"]) == 0
    assert timeless(read_lines(tmp_path / "run" / "metrics.jsonl")) == timeless(lines)
