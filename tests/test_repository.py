"""What stands around the code: the workflow, the templates, how to cite, the extras."""

import os
import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_workflow_runs_what_is_there():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    scripts = [command for command in commands if (ROOT / command.split()[0]).exists()]
    assert scripts == [".ci/run", "release/wheels"]
    assert all(os.access(ROOT / script, os.X_OK) for script in scripts)
    (suite,) = [c for c in commands if c.startswith("pytest ")]
    assert all((ROOT / word).is_dir() for word in suite.split() if word.startswith("tests/"))
    steps = [step.get("run", "") for step in jobs["wheels"]["steps"]]
    (install,) = [command for command in steps if command.startswith("pip install ")]
    assert sorted(install.split()[2:]) == sorted(PROJECT["optional-dependencies"]["release"])


def test_the_oldest_versions_that_are_allowed_are_run():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    oldest = jobs["versions"]["strategy"]["matrix"]["include"][0]
    run = dict(pair.split("==") for pair in oldest["packages"].split())
    run["triton"] = oldest["triton"]
    asked = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    pairs = (re.split("[>=;]+", requirement) for requirement in asked if ">=" in requirement)
    least = {name: version.strip() for name, version, *_ in pairs}
    assert {name: f"{least[name]}.0" for name in run} == run


def test_issues_ask_for_what_is_needed():
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        asked = yaml.safe_load(form.read_text())
        if form.name != "config.yml":
            assert {"name", "description", "body"} <= asked.keys()
            assert all(field["type"] in ("textarea", "checkboxes") for field in asked["body"])
        for path in re.findall(r"[\w/]+\.md", form.read_text()):
            assert (ROOT / path).is_file(), path


def test_the_citation_is_this_versions():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    told = [cited[name] for name in ("title", "version", "license")]
    assert told == [PROJECT["name"], PROJECT["version"], PROJECT["license"]]
    assert cited["preferred-citation"]["url"] == PROJECT["urls"]["Paper"]


def test_extras_for_what_is_optional():
    extras = PROJECT["optional-dependencies"]
    assert extras["flash-attn"][0].startswith("flash-attn>=")
    assert any(needed.startswith("pytest-benchmark") for needed in extras["bench"])
