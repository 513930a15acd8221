"""Configs and studies as people write and damage them. What is taken means what YAML 1.2 says, and
is read back from a run's directory as the same; all else is refused in one line."""

import datetime
import json
import math
import os
from pathlib import Path

import datasets
import pytest
import yaml
from helpers.mutations import Clock, as_json, changed, damaged, misplace, one_line
from helpers.training_cases import short_values, write_model, write_rows
from huggingface_hub import constants

from opsd.cli import compare
from opsd.cli.main import main
from opsd.cli.plan import Plan
from opsd.common.errors import UserError
from opsd.compare.study import load_study
from opsd.config.load import load_config, load_recipe, merge, parse_config, save_config

MEANINGS = [
    ("1:30", "1:30"), ("190:20:30", "190:20:30"), ("0x10", 16), ("0o17", 15), ("017", 17),
    ("0b11", "0b11"), ("1_000", "1_000"), ("+12", 12), ("-0", 0), ("1e3", 1000.0), ("1E-5", 1e-5),
    (".5", 0.5), ("1.", 1.0), ("12e03", 12000.0), ("1e", "1e"), ("yes", "yes"), ("No", "No"),
    ("on", "on"), ("OFF", "OFF"), ("y", "y"), ("n", "n"), ("True", True), ("FALSE", False),
    ("tRue", "tRue"), ("~", None), ("null", None), ("NULL", None), ("", None), ("none", "none"),
    ("'5'", "5"), ('"5"', "5"), ("!!str 5", "5"), ("!!int '5'", 5), ("!!float 1", 1.0),
    (".inf", math.inf), ("-.INF", -math.inf), (".nan", math.nan), ("nan", "nan"), ("inf", "inf"),
    ("2020-01-01", "2020-01-01"), ("2020-01-01 10:00:00", "2020-01-01 10:00:00"), ("=", "="),
    ("3 # three", 3), ("'#3'", "#3"), ("|\n    a\n    b\n", "a\nb\n"), (">-\n    a\n    b", "a b"),
    ("'it''s'", "it's"), ('"\\u00e9\\x41"', "\u00e9A"), ("1e400", math.inf),
    ("9" * 30, int("9" * 30)), ("9" * 5000, "refused"), ("0x" + "f" * 9999, "refused"),
    ("'\\ud800'", "\\ud800"), ('"\\ud800"', "refused"), ("9999-99-99", "9999-99-99"),
    ("0000-00-00T99:99:99Z", "0000-00-00T99:99:99Z"), ("0x", "0x"), ("-0x1", "-0x1"),
    ("!!timestamp 2020-01-01", "refused"), ("!!merge x", "refused"), ("!!str", ""), ("! 5", "5"),
    ("*p", "refused"), ("&a", None), ("<<", "<<"), ("? 5", "refused"), ("--- 5", "--- 5"),
    ("[1, 2,]", [1, 2]), ("{a: 1}", {"a": 1}), ("- 1", "refused"), ("@x", "refused"),
    ("&a 5", 5), ("*a", "refused"), ("!!binary aGk=", "refused"), ("!!set {a}", "refused"),
    ("!!python/object/apply:os.system [id]", "refused"), ("!x 5", "refused"), ("'5", "refused"),
    ("!!bool yes", "refused"), ("!!float 1:30", "refused"), ("!!null x", "refused"),
    ("!!omap [a: 1]", "refused"), ("!!pairs [a: 1]", "refused"), ("!!str 5", "5"), ("!!int 5", 5),
]  # fmt: skip
"""A value's text, and what it is in YAML 1.2's core schema; refused: no plain value of it."""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Whole configs' values, every field of each said: a plain one, one whose sources have teachers
    of their own, a mixture, rows with images, and a recipe of three runs."""
    place = tmp_path_factory.mktemp("good")
    model, rows = write_model(place / "model"), write_rows(place / "rows.jsonl")
    short = short_values(model, rows, place / "run")
    teachers = {"a": {"policy": "initial"}, "b": {"policy": "model", "path": str(model)}}
    sources = [{"source": str(rows), "teacher": "a", "weight": 2}, {"source": str(rows)}]
    members = [{"coefficient": [1, 0.5], "steps": 4}, {"context": "mine", "damping": 2.0}]
    images = {"columns": {"images": "pictures"}, "incomplete": "skip"}
    found = []
    for more in (
        {},
        {"data": {"source": sources}, "teacher": {"routes": teachers, "column": "answer"}},
        {"teacher": {"mix": members}, "prompts": {"contexts": {"mine": "{{ problem }}"}}},
        {"data": images},
    ):
        values = parse_config(merge(short, more)).model_dump()
        del values["data"]["size"], values["eval"]["options"], values["eval"]["columns"]
        found.append(values)
    last = {"method": "sft", "output": {"dir": str(place / "last")}}
    more = {"method": "grpo", "rollout": {"group_size": 2}, "train": {"steps": 2}, "then": last}
    return [*found, {**found[0], "then": more}]


@pytest.fixture
def good(shapes, draw):
    return draw.choice(shapes[:1] * 3 + shapes)


STUDY = {
    "quickstart": "tiny",
    "methods": ["opsd", "sft"],
    "seeds": [0, 1],
    "solutions": ["endless", 8],
    "solution_styles": ["words"],
    "problems": 20,
    "steps": 3,
    "threads": 1,
    "baseline": "sft",
    "settings": {"train": {"learning_rate": 1e-3}, "opsd": {"loss": {"beta": 0.4}}},
}


@pytest.fixture(autouse=True)
def without_the_hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(Plan, "show", lambda *arguments: None)  # nine tenths of the time


def block(values: dict, above: tuple = (), place: tuple = (), text: str = "") -> str:
    """YAML in blocks, the values in JSON; at `place` stands `text`."""
    made = ""
    for key, value in values.items():
        here = (*above, key)
        made += "  " * len(above) + f"{key}: "
        if here == place:
            made += text + "\n"
        elif isinstance(value, dict) and value:
            made += "\n" + block(value, here, place, text)
        else:
            made += json.dumps(value) + "\n"
    return made


def leaves(values: dict, above: tuple = ()) -> list[tuple]:
    found = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found += leaves(value, (*above, key))
        else:
            found.append((*above, key))
    return found


def in_another_style(draw, values: dict) -> str:
    """The same values in YAML of another style."""
    style = draw.choice(["'", '"'])
    made = yaml.safe_dump(values, default_style=style, default_flow_style=draw.random() < 0.5,
                          sort_keys=draw.random() < 0.5, width=draw.choice([20, 1000]))  # fmt: skip
    head = draw.choice(["", "# a comment\n", "---\n", "%YAML 1.2\n---\n", "\ufeff", "\n\n"])
    made = head + made + draw.choice(["", "...\n", "# the end", "\n\n"])
    return made.replace("\n", "\r\n") if draw.random() < 0.3 else made


def with_structure(draw, values: dict) -> str:
    """Anchors, merges, bombs, nesting, several documents, tabs, a key twice."""
    text = block(values)
    kind = draw.randrange(13)
    depth = draw.choice([5, 50, 5000, 100_000])
    if kind == 9:  # merge keys of an anchor, of several, of what is none, of itself
        merged = draw.choice(
            ["*p", "[*p, *p]", "[*p, 5]", "5", "*nobody", "{<<: *p, steps: 3}", "*t", "[]"]
        )
        text = text.replace("prompts: \n", "prompts: &p\n")
        return text.replace("train: \n", f"train: &t\n  <<: {merged}\n")
    if kind == 10:  # an alias as a key, an anchor twice, a tag at a section
        odd = ["? *p\n: 1\n", "x: &p 1\n", "*p : 1\n", "!!map {}: 1\n", "? &k {a: 1}\n: *k\n"]
        return text.replace("prompts: \n", "prompts: &p\n") + draw.choice(odd)
    if kind == 11:
        tag = draw.choice(
            ["!!map", "!!seq", "!!set", "!!omap", "!!str", "!<tag:yaml.org,2002:map>", "!e!x"]
        )
        return draw.choice(["", "%TAG !e! tag:e,2000:\n---\n"]) + text.replace(
            "train: \n", f"train: {tag}\n"
        )
    if kind == 12:  # text of another encoding, whose declaration says nothing
        odd = [
            "\ufeff\ufeff",
            "%YAML 9.9\n---\n",
            "%YAML 1.1\n%YAML 1.1\n---\n",
            "\x85",
            "\u2028",
            "\x00",
            "\x1b",
        ]
        return draw.choice(odd) + text
    if kind == 0:
        return text.replace("prompts: \n", "prompts: &p\n") + "twice: *p\n"
    if kind == 1:
        lines = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
        return "a0: &a0 [x]\n" + lines + text
    if kind == 2:
        return text + "data: " + "[" * depth + "]" * draw.choice([0, depth])
    if kind == 3:
        return text + "---\n" + text
    if kind == 4:
        return text.replace(
            "  steps", draw.choice(["\tsteps", "   steps", " steps", "\u00a0 steps"])
        )
    if kind == 5:
        return text.replace("train: \n", "train: \n  <<: {steps: 9}\n")
    if kind == 6:
        return text + draw.choice(
            ["train: 1\n", "'train': {}\n", "? [a]\n: 1\n", "? {}\n", "1: 2\n"]
        )
    if kind == 7:
        return "a: &a [*a]\n" + text
    return text + "x: " + "{a: " * depth


WORDS = {
    True: ("true", "yes", "on", "1", "1.0", "t", "y"),
    False: ("false", "no", "off", "0", "0.0", "-0.0", "f", "n"),
}


def same(given, taken) -> bool:
    """Whether what the config has is what was written."""
    if isinstance(taken, dict):
        return isinstance(given, dict) and all(
            same(given.get(k), v) for k, v in taken.items() if k in given
        )
    if isinstance(taken, list):
        given = given if isinstance(given, list) else [given]
        given = [one for one in given if one != "none"]  # of output.report_to
        return len(given) == len(taken) and all(map(same, given, taken))
    if isinstance(taken, bool):
        return str(given).lower() in WORDS[taken]
    if isinstance(taken, int | float):
        if isinstance(given, bool):
            return False
        try:
            return float(given) == taken
        except (TypeError, ValueError):
            return False
    if taken is None:
        return given is None
    return given == taken or (isinstance(given, datetime.date) and given.isoformat() == taken)


def check_taken(values: dict, config) -> None:
    taken = config.model_dump()
    for section, given in values.items():
        if given is not None and section != "then":  # a section without lines
            assert same(given, taken[section]), section


def write(draw, good: dict, path: Path):
    """A file, changed; returns the values that it holds, "refused", or None where nobody knows."""
    kind = draw.randrange(10)
    if kind < 4:
        place = draw.choice(leaves(good))
        text, meaning = draw.choice(MEANINGS)
        path.write_text(block(good, place=place, text=text), encoding="utf-8")
        if meaning == "refused":
            return meaning
        inner = meaning
        for key in reversed(place):
            inner = {key: inner}
        *above, last = place
        holder = values = json.loads(json.dumps(good))
        for key in above:
            holder = holder[key]
        holder[last] = meaning
        return values
    if kind < 7:
        values = changed(draw, good)
        if draw.random() < 0.5:
            path.write_text(in_another_style(draw, values), encoding="utf-8", errors="replace")
            return None if "\\ud800" in json.dumps(values) else values
        path.write_bytes(as_json(draw, values))
        return None
    if kind == 7:
        path.write_text(in_another_style(draw, good), encoding="utf-8")
        return good
    if kind == 8:
        path.write_text(with_structure(draw, good), encoding="utf-8")
        return None
    path.write_bytes(damaged(draw, block(good).encode()))
    if draw.random() < 0.1:
        misplace(draw, path)
    return None


def test_a_config_means_what_it_says_or_is_refused(draw, good, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    values = write(draw, good, path)
    with Clock():
        try:
            config, *rest = load_recipe(path)
        except UserError as error:
            one_line(str(error), str(path), *(f"{name} is" for name in good), ".", "unknown key")
            assert values is not good
            return
        assert values != "refused"
        if values is not None:
            check_taken(values, config)
            for run in rest:
                values = values["then"]
                check_taken(values, run)
            assert values.get("then") is None
        for run in (config, *rest):
            save_config(run, tmp_path / "again.yaml")
            assert load_config(tmp_path / "again.yaml") == run
        code = main(["train", str(path), "--dry-run"])
    shown = capsys.readouterr().err.splitlines()
    assert code in (0, 1)
    if code == 1:
        assert len(shown) == 1 and shown[0].startswith("opsd: "), shown
        one_line(shown[0], *config.model_dump(), str(path))
    else:
        assert shown == []


class Started(Exception):
    """The study's runs would start now."""


def test_a_study_means_what_it_says_or_is_refused(draw, tmp_path, monkeypatch, capsys):
    def run_jobs(jobs, *rest):
        raise Started(jobs)

    monkeypatch.setattr(compare, "run_jobs", run_jobs)
    path = tmp_path / "s.yaml"
    values = write(draw, STUDY, path)
    try:
        with Clock():
            code = main(["compare", str(path), "--output", str(tmp_path / "out"), "--debug"])
    except Started as started:
        study = load_study(path)
        assert values != "refused"
        if values is not None:
            check_taken(values, study)
        assert len(started.args[0]) == len(study.cells) * len(study.seeds)
        return
    except UserError as error:
        one_line(str(error), str(path), ".", *STUDY, "unknown key")
        return
    raise AssertionError(code, capsys.readouterr())


def test_a_study_without_an_end_is_one_line(tmp_path, capsys):
    path = tmp_path / "s.yaml"
    path.write_text("quickstart: tiny\n")
    os.truncate(path, 10**12)
    assert main(["compare", str(path)]) == 1
    assert "1,000,000,000,000 bytes; at most" in capsys.readouterr().err
