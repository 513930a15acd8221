"""Collapse detectors: what they see, that they say it once, that a run warns or stops."""

import pytest
from helpers.lines import read_lines
from helpers.training_cases import short_config

from opsd.cli.main import main
from opsd.config.load import save_config
from opsd.config.sections import CollapseSection
from opsd.training.collapse import CollapseWatch

pytestmark = pytest.mark.usefixtures("no_report")


def said(values, **section) -> list[dict]:
    """What a watch with a window of 2 says of each step's measures."""
    watch = CollapseWatch(CollapseSection(window=2, **section))
    return [watch(line) for line in values]


@pytest.mark.parametrize(
    ("name", "measure", "values", "step"),
    [
        ("entropy", "student_entropy", [1.0, 1.0, 0.3, 0.1, 0.05, 0.05], 4),
        ("length", "rollout_length", [100, 100, 50, 10, 8, 8], 4),
        ("pass_at_k", "pass_at_k", [0.1, 0.2, 0.6, 0.8, 0.4, 0.2], 5),
        ("inverted_gradient", "inverted_gradient_fraction", [0.1, 0.2, 0.7, 0.6, 0.9, 0.9], 3),
    ],
)
def test_a_measure_that_falls_is_named_once(name, measure, values, step):
    found = said([{measure: value} for value in values])
    assert [list(each) for each in found] == [[]] * step + [[name]] * (step < 6) + [[]] * (5 - step)
    assert measure in found[step][name] and f"train.collapse.{name} is" in found[step][name]


def test_measures_that_stay_or_grow_are_no_collapse():
    lines = [
        {
            "student_entropy": 1 - 0.1 * n,
            "rollout_length": 50 + 40 * n,
            "pass_at_k": 0.5 - 0.02 * n,
            "inverted_gradient_fraction": 0.3,
        }
        for n in range(8)
    ]
    assert said(lines) == [{}] * 8


def test_a_student_that_learns_becomes_sure_and_brief():
    """Until it unlearns: then what fell before is named too."""
    rates = [0.2, 0.2, 0.6, 0.8, 0.6, 0.1, 0.1]
    fallen = [(1.0, 100)] * 2 + [(0.01, 10)] * 5
    lines = [
        {"pass_at_k": rate, "student_entropy": entropy, "rollout_length": length}
        for rate, (entropy, length) in zip(rates, fallen, strict=True)
    ]
    assert list(map(list, said(lines))) == [[]] * 6 + [["pass_at_k", "entropy", "length"]]
    bare = said([{"student_entropy": line["student_entropy"]} for line in lines])
    assert list(map(list, bare)) == [[]] * 3 + [["entropy"]] + [[]] * 3


def test_one_step_is_not_a_window_and_missing_measures_are_no_zero():
    assert said([{"student_entropy": 1.0}, {"student_entropy": 1.0}, {"student_entropy": 0.0}]) == [
        {},
        {},
        {},
    ]
    assert said([{"student_entropy": None, "pass_at_k": 0.0}] * 4) == [{}] * 4


def test_off_says_nothing():
    assert said([{"inverted_gradient_fraction": 1.0}] * 4, on="off") == [{}] * 4


def test_a_resumed_watch_remembers():
    lines = [{"student_entropy": value} for value in (1.0, 1.0, 0.01, 0.01, 0.01)]
    whole = CollapseWatch(CollapseSection(window=2))
    apart = [whole(line) for line in lines]
    assert apart[3] and not apart[4]
    resumed = CollapseWatch(CollapseSection(window=2), past=lines[:3])
    assert list(resumed(lines[3])) == ["entropy"]
    assert CollapseWatch(CollapseSection(window=2), past=lines[:4])(lines[4]) == {}


@pytest.mark.parametrize("on", ["warn", "stop"])
def test_a_run_warns_or_stops(on, files, tmp_path, capsys):
    """A clip so small that most gradients are inverted."""
    config = short_config(
        *files,
        tmp_path / "run",
        loss={"clip": "entry", "clip_threshold": 1e-7},
        train={
            "steps": 4,
            "save_every": 0,
            "collapse": {"on": on, "window": 2, "inverted_gradient": 0.05},
        },
        eval={"problems": 0},
    )
    save_config(config, tmp_path / "c.yaml")
    assert main(["train", str(tmp_path / "c.yaml")]) == 0
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line.get("collapse") for line in lines[:2]] == [None, ["inverted_gradient"]]
    assert len(lines) == (4 if on == "warn" else 2)
    assert (tmp_path / "run" / "model").is_dir()
    assert "Step 2: collapse: inverted_gradient_fraction is" in capsys.readouterr().out
