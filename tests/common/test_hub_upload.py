"""The hub's repository is tried before work: held against a small hub of our own over HTTP."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from opsd.common.errors import UserError
from opsd.common.hub_upload import check_hub, push

WRITE, READ = "hf_write", "hf_read"


class SmallHub(BaseHTTPRequestHandler):
    """The hub's answers on who asks, on making a repository, and on who may write to it."""

    asked: list = []  # noqa: RUF012

    def log_message(self, *_):
        pass

    def _answer(self, status, **body):
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _token(self):
        self.asked.append(f"{self.command} {self.path}")
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def do_GET(self):
        token = self._token()
        if token not in (WRITE, READ):
            self._answer(401, error="Invalid username or password.")
        elif self.path.endswith("whoami-v2"):
            self._answer(200, name="ada", type="user")
        elif self.path.endswith("auth-check/write") and (token == READ or "/ada/" not in self.path):
            self._answer(403, error="Forbidden: you have no write access to this repository.")
        elif "/other/" in self.path or "/ada/" in self.path:
            self._answer(200, id="ada/mine", tags=[], siblings=[])
        else:
            self._answer(404, error="Repository not found")

    def do_POST(self):
        token, size = self._token(), int(self.headers["Content-Length"])
        asked = json.loads(self.rfile.read(size))
        owner = asked.get("organization") or "ada"
        if token == READ or owner != "ada":
            message = f"You don't have the rights to create a model under the namespace {owner!r}"
            self._answer(403, error=message)
        else:
            where = f"http://{self.headers['Host']}/{owner}/{asked['name']}"
            self._answer(200, url=where)


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), SmallHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(SmallHub, "asked", [])
    monkeypatch.setenv("HF_TOKEN", WRITE)
    yield monkeypatch
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["ada/mine", "mine"])
def test_a_repository_that_can_be_written_to_passes(hub, name):
    check_hub(name, private=True, create=True)
    assert SmallHub.asked[-1].endswith("/ada/mine/auth-check/write")


def test_a_dry_run_makes_nothing(hub):
    check_hub("ada/mine", private=True, create=False)
    assert not [line for line in SmallHub.asked if line.startswith("POST")]


REFUSED = [
    ("ada/mine", READ, "it cannot be written to", "403"),  # an old repository, a reader's token
    ("other/their", WRITE, "it cannot be written to", "403"),  # theirs, which can be read
    ("nobody/mine", WRITE, "it cannot be written to", "403"),  # no such namespace
    ("ada/mine", "hf_wrong", "not logged in", "HF_TOKEN"),
    ("a/b/c", WRITE, "not a repository's name", "a/b/c"),
    ("ada/-mine-", WRITE, "not a repository's name", "-mine-"),
]


@pytest.mark.parametrize(("name", "token", "why", "said"), REFUSED)
def test_what_cannot_be_uploaded_to_is_one_line_before_work(hub, name, token, why, said):
    hub.setenv("HF_TOKEN", token)
    with pytest.raises(UserError) as refused:
        check_hub(name, private=True, create=True)
    text = str(refused.value)
    assert text.startswith(f"output.push_to_hub is {name!r}: {why}") and said in text
    assert "\n" not in text


def test_without_a_network_it_is_one_line(hub):
    hub.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"the hub cannot be reached .*HF_HUB_OFFLINE"):
        check_hub("ada/mine", private=True, create=True)
    hub.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="the hub cannot be reached"):
        check_hub("ada/mine", private=True, create=True)


def test_an_upload_goes_to_the_whole_name(hub, tmp_path):
    names = []
    hub.setattr(
        "opsd.common.hub_upload.HfApi.upload_folder",
        lambda self, repo_id, folder_path: names.append(repo_id),
    )
    push("mine", tmp_path, private=True)
    assert names == ["ada/mine"]
