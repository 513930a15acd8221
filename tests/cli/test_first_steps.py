"""What a newcomer types first: init, examples, chat, eval of a run, bench."""

import io
import json
import re
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from helpers.training_cases import short_values

from opsd.cli.init import SCHEMA
from opsd.cli.main import COMMANDS, main
from opsd.common import display as displays
from opsd.common.display import Display
from opsd.config.load import load_config, load_recipe, merge, parse_config
from opsd.rollout.generate import GenerateSampler
from opsd.training.run import train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """A finished run's directory, and what its display wrote with the time of each line, of a model
    that takes three seconds for a batch, where a silence of one second is too long."""
    lines = []

    class Timed(io.StringIO):
        def write(self, text):
            lines.append((time.monotonic(), text))
            return len(text)

    directory = tmp_path_factory.mktemp("runs") / "run"
    values = short_values(*files, directory)
    values = merge(values, {"train": {"steps": 1, "save_every": 0}, "eval": {"samples": 1}})
    batch = GenerateSampler._batch

    def slow(*arguments):
        time.sleep(1.5)
        found = batch(*arguments)
        time.sleep(1.5)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerateSampler, "_batch", slow)
        patch.setattr(displays, "LONGEST_SILENCE", 0.4)
        patch.setattr(displays, "BEAT", 0.1)
        train(parse_config(values), Display(file=Timed()))
    return directory, lines


def test_the_bare_command_shows_what_there_is(capsys):
    with pytest.raises(SystemExit) as end:
        main([])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert all(f"  {name:<15}" in said for name in COMMANDS)
    assert said.splitlines()[-1] == "Begin with: opsd quickstart --tiny"


def test_a_missing_config_is_looked_for_here(run, tmp_path, monkeypatch, capsys):
    for place, wanted in (
        (run[0], "`opsd train . --resume`"),
        (tmp_path, "`opsd train mine.yaml`"),
    ):
        (tmp_path / "mine.yaml").touch()
        monkeypatch.chdir(place)
        with pytest.raises(SystemExit):
            main(["train", "--resume"])
        assert wanted in capsys.readouterr().err


def test_a_slow_model_is_never_silent(run):
    _, lines = run
    begun = next(i for i, (_, text) in enumerate(lines) if text.startswith("Evaluate the student"))
    ended = max(i for i, (_, text) in enumerate(lines) if "Train by" in text)
    times = [when for when, _ in lines[begun : ended + 1]]
    assert times[-1] - times[0] > 6  # three batches
    assert max(b - a for a, b in pairwise(times)) < 2.5
    text = "".join(text for _, text in lines)
    assert re.search(r"Evaluate the student, step 0: .*sampling \d", text)
    assert re.search(r"Evaluate the student, step 0: .*\d tokens, .*tokens/s", text)
    assert re.search(r"Evaluate the student, step 0: .*at most .* left, sampling", text)
    assert re.search(r"Train by OPSD: .*sampling \d", text)
    assert re.search(r"step 1: done .*accuracy 0\.0 % \(0\.0 to \d\d\.\d\), tokens \d", text)
    assert "Save the model" in text


def test_a_run_is_evaluated_by_its_directory(run, tmp_path, monkeypatch, capsys):
    """Its model, its held-out problems, its prompts."""
    directory, _ = run
    output = tmp_path / "again"
    assert main(["eval", str(directory), "--output", str(output)]) == 0
    result = json.loads((output / "result.json").read_text())
    assert result["model"] == str(directory / "model")
    saved = (directory / "evaluations.jsonl").read_text().splitlines()
    assert result["problems"] == json.loads(saved[-1])["problems"] == 4
    assert result["mean_length"] == json.loads(saved[-1])["mean_length"]
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text('{"task": "1+1", "result": "2"}\n')
    config = directory / "config.yaml"
    saved = config.read_text()
    config.write_text(saved.replace("columns: {}", "columns: {problem: task, answer: result}", 1))
    asked = ["--benchmark", str(renamed), "--max-new-tokens", "3", "--output", str(tmp_path / "r")]
    assert main(["eval", str(directory), *asked]) == 0
    config.write_text(saved)


def test_a_run_of_the_tiny_quickstart_is_graded_as_its_report_is(run, tmp_path):
    """Its answers are worksheets, without a box: the grader of all else would call each wrong."""
    directory, _ = run
    (tmp_path / "quickstart.json").write_text('{"tiny": true}')
    shutil.copytree(directory, tmp_path / "opsd")
    output = tmp_path / "again"
    assert main(["eval", str(tmp_path / "opsd"), "--output", str(output)]) == 0
    lines = (output / "answers.jsonl").read_text().splitlines()
    said = {json.loads(line)["reason"] for line in lines}
    assert said <= {"no result stated", "a result differs", "all results right"}


@pytest.mark.parametrize("solution", [False, True])
def test_chat_answers_each_line_of_both_models(run, solution, monkeypatch, capsys):
    directory, _ = run
    typed = "1+1\nS\n2+2\nT\n" if solution else "1+1\n2+2\n\n3+3\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    asked = ["chat", str(directory), "--base", "--max-new-tokens", "4"]
    assert main([*asked, *(["--with-solution"] if solution else [])]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\nmodel: ") == shown.count("\nbase: ") == (2 if solution else 3)


def test_chat_shows_the_solution_to_the_model(run, monkeypatch, capsys):
    from opsd.cli.chat import talker
    from opsd.data.prompts import Prompts

    directory, _ = run
    config = load_config(directory / "config.yaml")
    seen, ids = [], Prompts.ids
    monkeypatch.setattr(
        Prompts, "ids", lambda self, row, role: seen.append((role, row)) or ids(self, row, role)
    )
    answer = talker(str(directory / "model"), config.prompts, 3, 0.0)
    answer("1+1", "2")
    answer("2+2", "")
    answer("3+3", "")
    (teacher, shown), (student, first), (_, second) = seen
    assert (teacher, student) == ("teacher", "student")
    assert shown.solution == "2" and first.solution == "" and first.history == ()
    assert second.history[0]["content"] == "2+2"


def test_every_example_can_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["examples"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert "mine" in listed and len(listed) > 20
    for name in listed:
        file = tmp_path / f"{name.replace('/', '-')}.yaml"
        assert main(["init", name, "--output", str(file)]) == 0
        said = capsys.readouterr().out
        assert str(file) in said and f"examples/{name}.yaml" not in file.read_text()
        if "opsd train" in said:
            load_recipe(file)
    (tmp_path / "mine.yaml").unlink()
    assert main(["init"]) == 0
    assert (tmp_path / "mine.yaml").read_text().startswith("# yaml-language-server: $schema=/")
    assert main(["init"]) == 1  # nothing is written over


def test_the_schema_knows_the_examples():
    schema = json.loads(SCHEMA.read_text())
    assert set(schema["properties"]) > {"model", "data", "train"}
    for path in sorted((ROOT / "examples").glob("*.yaml")):
        values = yaml.safe_load(path.read_text())
        if "quickstart" in values:
            continue
        then = values.pop("then", {})  # a whole config that leaves out what does not change
        for section, inside in [*values.items(), *then.items()]:
            known = schema["properties"][section]
            if isinstance(inside, dict):
                name = known["$ref"].rpartition("/")[2]
                fields = schema["$defs"][name]
                assert fields["additionalProperties"] is False
                assert set(inside) <= set(fields["properties"])


def test_bench_is_the_kernels_benchmark():
    done = subprocess.run(
        [sys.executable, "-m", "opsd", "bench", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--quick" in done.stdout and "--shape" in done.stdout


def test_an_example_of_the_quickstarts_model_says_what_makes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(ROOT / "examples/smollm2.yaml")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].endswith("no such directory; `opsd quickstart` makes it")
