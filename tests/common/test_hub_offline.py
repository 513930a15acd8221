"""A name that is no path, without a connection or on a hub without it: one line says it at once."""

import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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


def test_an_absent_model_is_said_before_torch_starts(hub, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: Qwen/Qwen3-0.7B}}\ndata: {{source: {rows}}}\n"
        "eval: {problems: 4}\ntrain: {problems_per_step: 4}\n"
    )
    for typed in (
        f"train {tmp_path}/run.yaml",
        f"train {tmp_path}/run.yaml --dry-run",
        "chat Qwen/Qwen3-0.7B",
        "serve-teacher Qwen/Qwen3-0.7B",
        f"eval Qwen/Qwen3-0.7B --benchmark {rows}",
    ):
        assert main(typed.split()) == 1
        said = capsys.readouterr()
        assert said.err.endswith("; did you mean 'Qwen/Qwen3-1.7B'?\n")
        assert len((said.out + said.err).splitlines()) == 1  # no "Start torch and transformers"


CODES = {"absent": (404, "RepoNotFound"), "private": (401, "RepoNotFound")}
CODES |= {"gated": (403, "GatedRepo"), "adapter": (404, "EntryNotFound"), "broken": (500, "")}


class Hub(BaseHTTPRequestHandler):
    """Answers for a file of a repository as the hub does, and seldom at once for "slow"."""

    released = threading.Event()

    def do_HEAD(self):
        name, _, revision, _ = self.path.split("/")[-4:]  # a dataset has datasets/ before its owner
        if name == "slow":
            self.released.wait(30)
        code, said = CODES.get(name, (200, ""))
        if revision == "absent":
            code, said = 404, "RevisionNotFound"
        self.send_response(307 if name == "renamed" else code)
        if name == "renamed":
            self.send_header("Location", self.path.replace("renamed", "there"))
        if said:
            self.send_header("X-Error-Code", said)
        for header in ("ETag", "X-Repo-Commit", "Content-Length"):
            self.send_header(header, "7")
        self.end_headers()

    def log_message(self, *_):
        pass


def test_only_what_the_hub_certainly_lacks_is_refused(hub, tmp_path):
    hub.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        hub.setattr(constants, "ENDPOINT", place)
        form = f"{place}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        hub.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", form)
        for name in ("absent", "private"):
            assert "the hub has no such one" in offline.why_absent(f"owner/{name}", None)
        assert "no revision 'absent'" in offline.why_absent("owner/there", "absent")
        for name in ("there", "renamed", "gated", "adapter", "broken"):
            assert offline.why_absent(f"owner/{name}", None) == ""
            assert offline.why_absent(f"owner/{name}", None, "dataset") == ""
        said = offline.why_absent("owner/absent", None, "dataset")
        assert "the hub has no such one" in said
        begun = time.monotonic()
        assert offline.why_absent("owner/slow", None) == ""
        assert time.monotonic() - begun < 3
        Hub.released.set()
        server.shutdown()


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
def test_what_is_in_the_cache_asks_nobody(hub, tmp_path, file):
    hub.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    hub.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--owner--there"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "v1").write_text("7" * 40)
    (place / "snapshots" / ("7" * 40)).mkdir(parents=True)
    (place / "snapshots" / ("7" * 40) / file).write_text("{}")
    hub.setattr(offline, "reachable", lambda: pytest.fail("it asks"))
    for revision in ("v1", "7" * 40):
        assert offline.why_absent("owner/there", revision) == ""
    hub.setattr(constants, "HF_HUB_OFFLINE", True)
    assert offline.why_absent("owner/there", None) == offline.NO_ANSWER


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


def test_a_dataset_in_a_cache_asks_nobody(hub, tmp_path):
    """In the hub's own, or prepared by `datasets`."""
    hub.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub.setenv("HF_DATASETS_CACHE", str(tmp_path / "prepared"))
    hub.setattr(offline, "reachable", lambda: pytest.fail("it asks"))
    (tmp_path / "hub" / "datasets--one--sums").mkdir(parents=True)
    (tmp_path / "prepared" / "two___sums").mkdir(parents=True)
    for name in ("one/sums", "two/sums"):
        assert offline.why_absent(name, None, "dataset") == ""
    hub.setattr(constants, "HF_HUB_OFFLINE", True)
    assert offline.why_absent("three/sums", None, "dataset") == offline.NO_ANSWER
