"""Machines that lack what others have: a home, a user's name, a locale of UTF-8, a proxy."""

import os
import pwd
import subprocess
import sys

import pytest
import yaml
from helpers.training_cases import short_values
from huggingface_hub import constants

from opsd.cli.main import main
from opsd.cli.plan import Plan
from opsd.common import hub_offline
from opsd.common.errors import UserError
from opsd.quickstart.cache import cache_directory


@pytest.fixture
def config(files, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(short_values(*files, tmp_path / "run")))
    return path


@pytest.fixture
def nobody(monkeypatch):
    """A process under a number that the system has no entry for, as in many containers."""

    def no_entry(whose):
        raise KeyError(f"getpwuid(): uid not found: {whose}")

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    monkeypatch.setattr(pwd, "getpwnam", no_entry)
    for name in ("HOME", "USER", "LOGNAME", "OPSD_CACHE"):
        monkeypatch.delenv(name, raising=False)


def test_training_needs_no_home(nobody, config, capsys, monkeypatch):
    monkeypatch.setattr(Plan, "show", lambda *arguments: None)
    assert main(["train", str(config), "--dry-run"]) == 0
    assert "Nothing was trained" in capsys.readouterr().out
    for field in ("data.source", "model.path", "eval.source"):
        assert main(["train", str(config), "--dry-run", f"{field}=~nobody/x.jsonl"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("opsd: ") and "~nobody/x.jsonl" in line


def test_a_cache_needs_a_home_or_a_name(nobody, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="OPSD_CACHE: there is no home"):
        cache_directory()
    monkeypatch.setenv("OPSD_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path


def test_files_are_utf_8_under_any_locale(tmp_path):
    (tmp_path / "c.yaml").write_text("\u6570: 1\n", encoding="utf-8")
    ours = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "opsd", "train", str(tmp_path / "c.yaml")],
        env=os.environ | ours,
        capture_output=True,
    )
    assert done.returncode == 1 and "unknown key '\u6570'" in done.stderr.decode()


def test_no_proxy_alone_is_no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NO_PROXY", "localhost")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    hub_offline.reachable.cache_clear()
    assert not hub_offline.reachable()
    hub_offline.reachable.cache_clear()
