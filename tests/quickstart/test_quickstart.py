"""`opsd quickstart --tiny`, cut short: what it leaves behind, and goes on with."""

import json
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers.lines import read_lines
from helpers.training_cases import timeless
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd.cli.main import main
from opsd.config.load import load_config, parse_config
from opsd.quickstart import run as flow
from opsd.quickstart import tiny_model as tiny
from opsd.quickstart.settings import ARGUMENTS, Asked
from opsd.quickstart.worksheet import WorksheetGrader
from opsd.report import curves_png as curves
from opsd.runs import directory as rundir
from opsd.runs.log import FILES
from opsd.training.held_out import HeldOut
from opsd.training.load_data import load_data
from opsd.training.trainer import TrainingLoop

METHODS = ("opsd", "grpo", "sft")


@contextmanager
def short(cache, plots=False):
    """A base of three steps, kept in `cache`; without plots, the rest is short as well."""
    from opsd.quickstart import tiny_recipe

    training = replace(tiny.BaseTraining(), steps=3, batch_size=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPSD_CACHE", str(cache))
        patch.setattr(tiny.cached_base, "__defaults__", (training,))
        patch.setattr(tiny, "BaseTraining", lambda: training)
        if not plots:
            patch.setattr(curves, "write_curves", lambda results, file: file.write(b""))
            patch.setattr(tiny_recipe, "TRAIN_ROWS", 32)
            patch.setitem(tiny_recipe.SECTIONS["train"], "problems_per_step", 8)
            patch.setitem(tiny_recipe.SECTIONS["rollout"], "max_new_tokens", 8)
            patch.setitem(tiny_recipe.METHODS["grpo"]["train"], "problems_per_step", 2)
        yield patch


def quickstart(directory, *more):
    arguments = ["--output", str(directory), "--steps", "2", "--problems", "8"]
    return main(["quickstart", "--tiny", "--seed", "3", *arguments, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a quickstart of two steps a method, and the cache of its base."""
    directory = tmp_path_factory.mktemp("quickstart") / "out"
    cache = directory.parent / "cache"
    with short(cache, plots=True):
        assert quickstart(directory) == 0
    return directory, cache


@pytest.fixture(scope="module")
def undisturbed(finished):
    """The directory of a shorter one, which nobody interrupts."""
    directory = finished[0].parent / "undisturbed"
    with short(finished[1]):
        assert quickstart(directory) == 0
    return directory


def test_the_summary_is_the_designs(finished):
    summary = json.loads((finished[0] / "summary.json").read_text())
    fields = {"model", "base", "methods", "problems", "seconds", "peak_memory_bytes"}
    assert set(summary) == fields | {"seed", "versions", "machine"}
    assert set(summary["base"]) == {"accuracy", "teacher_accuracy", "teacher_problems"}
    assert (summary["problems"], summary["seed"]) == (8, 3)
    assert summary["seconds"] > 0 and summary["peak_memory_bytes"] > 1e8
    assert tuple(summary["methods"]) == METHODS
    for name, method in summary["methods"].items():
        assert set(method) == {"accuracy", "generated_tokens", "trained_tokens", "curve"}
        charged = method["trained_tokens" if name == "sft" else "generated_tokens"]
        assert charged > 0 and (method["generated_tokens"] > 0) == (name != "sft")
        assert method["curve"][0] == [0, summary["base"]["accuracy"]]
        assert method["curve"][-1] == [charged, method["accuracy"]]
        assert 0 <= method["accuracy"] <= 1


def test_each_method_has_a_whole_run(finished):
    directory, cache = finished
    assert len(list(cache.iterdir())) == 1
    for name in ("report.html", "curves.png"):
        assert (directory / name).stat().st_size > 1000
    assert set(yaml.safe_load((directory / "config.yaml").read_text())) == set(METHODS)
    for method in METHODS:
        run = directory / method
        assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, 2]
        steps = [(e["step"], e["role"]) for e in read_lines(run / "evaluations.jsonl")]
        assert steps == [(0, "student"), (0, "teacher"), (2, "student")]
        assert len(read_lines(run / "samples.jsonl")) == 8
        for name in ("report.html", "curves.png", "summary.json"):
            assert (run / name).stat().st_size > 100
        assert json.loads((run / "summary.json").read_text())["method"] == method
    for place in ("base", *METHODS):
        assert AutoModelForCausalLM.from_pretrained(directory / place / "model").num_parameters()
        assert AutoTokenizer.from_pretrained(directory / place / "model").chat_template


def test_a_methods_config_is_enough_to_run_it_again(finished):
    directory, _ = finished
    config = load_config(directory / "opsd" / "config.yaml")
    assert parse_config(config.model_dump()) == config
    rows, held_out = load_data(config)
    assert len(held_out) == 8 and len(rows) == 8000
    assert not {row.problem for row in rows} & {row.problem for row in held_out}


def test_an_output_that_is_not_empty_is_left_alone(finished, tmp_path, capsys):
    directory, cache = finished
    before = (directory / "summary.json").read_text()
    (tmp_path / "letter").touch()
    with short(cache):
        for arguments, says in [
            ((directory,), "started before; go on with --resume, or choose another"),
            ((directory, "--resume", "--seed", "4"), "it was begun with seed 3, not 4; --resume"),
            ((directory, "--resume", "train.steps=1"), "with overrides [], not ['train.steps=1']"),
            ((tmp_path,), "it is not empty; choose another, or remove it"),
            ((tmp_path, "--resume"), "it is not empty; choose another, or remove it"),
        ]:
            assert quickstart(*arguments) == 1
            error = capsys.readouterr().err
            assert error.startswith("opsd: --output is") and says in error
            assert error.count("\n") == 1 and (directory / "summary.json").read_text() == before


def what_was_learnt(directory, method):
    """A method's weights, and its lines but for what was measured by the clock."""
    place = directory / method
    lines = [timeless(read_lines(place / name)) for name in FILES]
    return (place / "model" / "model.safetensors").read_bytes(), lines


def interrupt(patch, owner, name, at):
    """Ctrl-C before the call number `at` (0: never) of `owner.name`; returns all calls' list."""
    original, calls = getattr(owner, name), []

    def interrupted(*arguments, **more):
        calls.append(arguments)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **more)

    patch.setattr(owner, name, interrupted)
    return calls


@pytest.mark.parametrize(
    ("owner", "name", "at", "evaluated", "trained"),
    [
        (HeldOut, "evaluate", 2, 2, ["opsd", "grpo", "sft"]),  # before the base is measured
        (flow, "run", 2, 0, ["grpo", "sft"]),  # between two methods
        (TrainingLoop, "training_step", 4, 0, ["grpo", "sft"]),  # within the second
        (flow, "_summary", 1, 0, []),
    ],
    ids=["base", "between", "within", "end"],
)
def test_an_interrupted_one_goes_on_where_it_was(
    owner, name, at, evaluated, trained, finished, undisturbed, tmp_path
):
    directory = tmp_path / "out"
    with short(finished[1]) as patch:
        interrupt(patch, owner, name, at)
        assert quickstart(directory) == 130
    with short(finished[1]) as patch:
        evaluations = interrupt(patch, HeldOut, "evaluate", 0)
        runs = interrupt(patch, flow, "run", 0)
        assert quickstart(directory, "--resume") == 0
    assert [config.method for config, *_ in runs] == trained
    of_base = [call[-1] for call in evaluations if isinstance(call[-1], str)]
    assert of_base == ["base", "base as teacher"][:evaluated]
    for method in METHODS:
        assert what_was_learnt(directory, method) == what_was_learnt(undisturbed, method)
    summaries = [json.loads((d / "summary.json").read_text()) for d in (directory, undisturbed)]
    for same in ("base", "methods", "problems", "seed"):
        assert summaries[0][same] == summaries[1][same]


def test_a_method_goes_on_from_its_checkpoint(finished, undisturbed, tmp_path):
    directory, override = tmp_path / "out", "train.save_every=1"
    with short(finished[1]) as patch:
        interrupt(patch, TrainingLoop, "training_step", 2)
        assert quickstart(directory, override) == 130
    with short(finished[1]) as patch:
        steps = interrupt(patch, TrainingLoop, "training_step", 0)
        assert quickstart(directory, override, "--resume", "--methods", "opsd") == 0
    assert len(steps) == 1
    assert what_was_learnt(directory, "opsd") == what_was_learnt(undisturbed, "opsd")


def test_methods_can_be_added(finished, tmp_path):
    directory = tmp_path / "out"
    with short(finished[1]):
        assert quickstart(directory, "--methods", "grpo") == 0
        assert quickstart(directory, "--methods", "sft", "--resume") == 0
    summary = json.loads((directory / "summary.json").read_text())
    assert tuple(summary["methods"]) == ("grpo", "sft")
    assert set(yaml.safe_load((directory / "config.yaml").read_text())) == {"grpo", "sft"}


def test_what_stopped_before_anything_was_made_is_no_obstacle(finished, tmp_path, capsys):
    """A mistake in the command, or no network: the next try needs no other directory."""
    directory = tmp_path / "out"
    with short(finished[1]) as patch:
        interrupt(patch, tiny, "cached_base", 1)
        assert quickstart(directory) == 130
        assert quickstart(directory, "--methods", "sft", "--solutions", "5") == 0
    arguments = json.loads((directory / "quickstart.json").read_text())
    assert arguments["solutions"] == 5


@pytest.mark.parametrize(("keep", "accuracy"), [("last", 0.25), ("both", 0.25), ("best", 0.75)])
def test_the_summary_is_of_the_model_in_its_place(keep, accuracy, finished, tmp_path):
    run = finished[0] / "opsd"
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["output"]["keep"] = keep
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [line for line in read_lines(run / "evaluations.jsonl") if line["role"] == "student"]
    lines = [lines[0] | {"step": n, "accuracy": a} for n, a in enumerate((0.5, 0.75, 0.25))]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert flow._curve(tmp_path, "opsd")["accuracy"] == accuracy


def test_problems_without_solutions_hold_the_student(finished, tmp_path):
    directory = tmp_path / "out"
    held = ("--solutions", "5", "opsd.prompts.hold=true")
    with short(finished[1]):
        assert quickstart(directory, "--methods", "opsd,sft", *held) == 0
    configs = yaml.safe_load((directory / "config.yaml").read_text())
    rows = {name: read_lines(Path(configs[name]["data"]["source"])) for name in configs}
    assert len({row["problem"] for row in rows["sft"]}) == 5 < len(rows["sft"])
    solved = [bool(row["solution"]) for row in rows["opsd"]]
    assert solved == [True, False, False, False] * (len(solved) // 4)
    assert len({row["problem"] for row in rows["opsd"]}) == 5 + 3 * len(solved) // 4


def test_an_evaluation_of_a_tiny_run_has_the_grader_of_worksheets(finished, tmp_path, monkeypatch):
    made: list = []
    place = "opsd.cli.evaluate.WorksheetGrader"
    monkeypatch.setattr(place, lambda: made.append(WorksheetGrader()) or made[-1])
    monkeypatch.chdir(finished[0] / "opsd")
    for number, name in enumerate([str(finished[0] / "opsd"), "."], start=1):
        assert main(["eval", name, "--output", str(tmp_path / str(number))]) == 0
        assert len(made) == number


def test_a_quickstart_is_one_process_alone(finished, tmp_path, capsys):
    """Also before it has a config.yaml, which is written last."""
    (tmp_path / "base").mkdir()
    (tmp_path / ARGUMENTS).touch()
    with short(finished[1]), rundir.locked(tmp_path, "--output", ARGUMENTS):
        assert quickstart(tmp_path, "--resume") == 1
    assert "is training there, on " in capsys.readouterr().err


def test_smollm2s_teacher_is_made_once(tmp_path, monkeypatch):
    """And anew where it was cut off."""
    from opsd.quickstart import smollm2_recipe as module

    made = []

    def learn(config, *_):
        made.append(config.output.dir)
        return original(config, None, None, [], None, None)

    original = module._learn
    monkeypatch.setattr(module, "load_model", lambda section: (None, None))
    monkeypatch.setattr(module, "run", lambda *_, **__: None)
    monkeypatch.setattr(module, "_learn", learn)
    recipe, place = module.smollm2_recipe(Asked(problems=1)), tmp_path / "teacher"
    assert recipe.make_teacher(tmp_path, None) == place / "model"
    (place / "half.part").touch()
    assert recipe.make_teacher(tmp_path, None) == place / "model"
    assert made == [str(place)] * 2 and not (place / "half.part").exists()
    (place / "summary.json").touch()
    assert recipe.make_teacher(tmp_path, None) == place / "model"
    assert len(made) == 2


def test_smollm2s_recipe_runs_whole_with_another_model(finished, tmp_path, monkeypatch):
    """Its teacher answers fewer problems than its students."""
    from opsd.quickstart import smollm2_recipe as module

    monkeypatch.setattr(module, "FEW_PROBLEMS", 2)
    monkeypatch.setattr(module, "COLD_ROWS", 2)
    monkeypatch.setitem(module.SECTIONS["prompts"], "student", "{{ problem }}")
    monkeypatch.setitem(module.SECTIONS["prompts"], "teacher", "{{ problem }} {{ solution }}")
    model = finished[0] / "opsd" / "model"
    arguments = ["--model", str(model), "--output", str(tmp_path / "out"), "--problems", "3"]
    arguments += ["--steps", "1", "--solution-style", "terse", "train.problems_per_step=2"]
    assert main(["quickstart", *arguments]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["base"]["teacher_problems"] == 2 and summary["problems"] == 3


def test_a_model_with_too_small_a_window_is_refused_before_it_is_evaluated(
    finished, tmp_path, capsys
):
    model = finished[0] / "opsd" / "model"
    arguments = ["--model", str(model), "--output", str(tmp_path / "out"), "--steps", "1"]
    assert main(["quickstart", *arguments]) == 1
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith(f"opsd: --model is {str(model)!r}: its window is 256 tokens")
    assert line.endswith("choose a model with a larger window") and "Evaluate" not in shown.out
