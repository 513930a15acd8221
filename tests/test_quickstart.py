"""`opsd quickstart --tiny`, cut short: what it leaves behind."""

import json
from dataclasses import replace

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd.cli import main
from opsd.config import load_config, parse_config
from opsd.quickstart import tiny
from opsd.runlog import read_lines
from opsd.train import load_data

METHODS = ("opsd", "grpo", "sft")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a quickstart of two steps a method, and the cache of its base."""
    import opsd.quickstart.tiny_recipe  # noqa: F401, before BaseTraining is another

    directory = tmp_path_factory.mktemp("quickstart") / "out"
    cache = directory.parent / "cache"
    short = replace(tiny.BaseTraining(), steps=3, batch_size=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPSD_CACHE", str(cache))
        patch.setattr(tiny.cached_base, "__defaults__", (short,))
        patch.setattr(tiny, "BaseTraining", lambda: short)
        arguments = ["--output", str(directory), "--steps", "2", "--problems", "8"]
        assert main(["quickstart", "--tiny", "--seed", "3", *arguments]) == 0
    return directory, cache


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


def test_an_output_that_is_not_empty_is_left_alone(finished, capsys):
    directory, _ = finished
    before = (directory / "summary.json").read_text()
    assert main(["quickstart", "--tiny", "--output", str(directory)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("opsd: --output is") and "not empty" in error
    assert error.count("\n") == 1 and (directory / "summary.json").read_text() == before
