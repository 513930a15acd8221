"""A name that is no path, on a machine without a connection: said within seconds, in one line."""

import socket
import sys
import threading
import time

import pytest
from helpers.training_cases import write_model, write_rows
from huggingface_hub import constants

from opsd.cli.main import main
from opsd.common import hub_offline as offline


@pytest.fixture
def hub(monkeypatch):
    """The hub at an address where nobody is; nothing is known of it yet."""
    known = offline.reachable
    known.cache_clear()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(offline, "getproxies", dict)
    if "datasets" in sys.modules:
        monkeypatch.setattr(sys.modules["datasets"].config, "HF_HUB_OFFLINE", False)
    yield monkeypatch
    known.cache_clear()


def test_absent_names_are_said_at_once(hub, tmp_path, capsys):
    model, rows = write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    import datasets  # noqa: F401 - whose seconds are not the command's

    hub.setattr(sys.modules["datasets"].config, "HF_HUB_OFFLINE", False)
    for model_path, benchmark in ((model, "owner/absent"), ("owner/absent", rows)):
        begun = time.monotonic()
        assert main(["eval", str(model_path), "--benchmark", str(benchmark)]) == 1
        assert time.monotonic() - begun < 10  # it was 24 and 47 s
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("opsd: ")]
        assert len(lines) == 1 and "'owner/absent'" in lines[0]
    assert constants.HF_HUB_OFFLINE and sys.modules["datasets"].config.HF_HUB_OFFLINE


def test_a_path_asks_nobody(hub, tmp_path):
    hub.setattr(offline, "reachable", lambda: pytest.fail("it asks"))
    offline.before_asking_hub(str(tmp_path))
    assert not constants.HF_HUB_OFFLINE


def test_a_resolver_that_never_answers_is_not_waited_for(hub):
    release = threading.Event()
    hub.setattr(offline, "SECONDS", 0.1)

    def connect(*_):
        release.wait(30)
        raise OSError

    hub.setattr(socket, "create_connection", connect)
    begun = time.monotonic()
    assert not offline.reachable() and time.monotonic() - begun < 10
    release.set()


def test_who_answers_or_a_proxy_is_reachable(hub):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        hub.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert offline.reachable()
    offline.before_asking_hub("owner/absent")
    assert not constants.HF_HUB_OFFLINE
    offline.reachable.cache_clear()
    hub.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.setattr(offline, "getproxies", lambda: {"https": "http://proxy"})
    assert offline.reachable()
