"""Files are written whole or not at all, whatever is in the way and whoever else writes."""

import os
import re
import stat
import threading
from pathlib import Path

import pytest

import opsd
from opsd.common.errors import UserError
from opsd.common.files import is_unfinished, read_lines, write_file, write_json, write_lines

PACKAGE = Path(opsd.__file__).parent


def test_text_bytes_and_what_a_function_writes(tmp_path):
    path = tmp_path / "file"
    for content, wanted in (
        ("é\ud800\n", "é?\n".encode()),
        (b"\0\xff", b"\0\xff"),
        (lambda file: file.write(b"drawn"), b"drawn"),
    ):
        write_file(path, content)
        assert path.read_bytes() == wanted
    write_json(path, {"a": "é"})
    assert path.read_text() == '{\n  "a": "é"\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_umask_decides_who_may_read(tmp_path):
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "file", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_file(path, "old")

    def half(file):
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(path, half)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_links_are_replaced_and_never_followed(tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.write_text("not ours")
    (tmp_path / "file").symlink_to(other)
    write_file(tmp_path / "file", "ours")
    assert other.read_text() == "not ours" and not (tmp_path / "file").is_symlink()
    monkeypatch.setattr("secrets.token_hex", lambda _: "00")  # somebody guesses the name
    (tmp_path / ".file.00.part").symlink_to(other)
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "file", "ours")
    assert other.read_text() == "not ours"


def test_several_writers_do_not_disturb_each_other(tmp_path):
    path, texts = tmp_path / "file", [str(i) * 100_000 for i in range(4)]
    threads = [
        threading.Thread(target=lambda text=text: [write_file(path, text) for _ in range(10)])
        for text in texts
    ]
    for thread in threads:
        thread.start()
    seen = set()
    while any(thread.is_alive() for thread in threads):
        seen.add(path.read_text() if path.exists() else texts[0])
    assert seen <= set(texts) and list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (calls.append(n), r(*a))[1])
    write_file(tmp_path / "file", "text")
    assert calls == ["fsync", "replace", "fsync"]  # the last one is the directory's


def test_lines_are_read_whole_or_named(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert read_lines(path) == []
    write_lines(path, [{"a": 1}, {"b": "é"}])
    path.write_text(path.read_text() + '{"c": 1')
    assert read_lines(path) == [{"a": 1}, {"b": "é"}]  # the last one is cut short
    path.write_text('{"a": 1}\n7\n\nnonsense\n{"b": 2}')
    with pytest.raises(UserError, match=r"lines\.jsonl is damaged in line 2"):
        read_lines(path)
    bad = []
    assert read_lines(path, bad) == [{"a": 1}, {"b": 2}] and bad == [2, 4]


def test_what_an_interrupted_write_leaves_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # killed
    with pytest.raises(ZeroDivisionError):
        write_file(tmp_path / "file", lambda file: 1 / 0)
    assert all(map(is_unfinished, tmp_path.iterdir())) and any(tmp_path.glob("*.part"))


WRITES = re.compile(r"""write_text|write_bytes|os\.replace|\bopen\([^)]*["'][wx]""")
# Into a directory of its own that is unpacked, and then moved or removed.
ELSEWHERE = {"common/files.py", "quickstart/download.py"}


def test_no_other_module_writes_files_by_hand():
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(WRITES.search(line) and ">>>" not in line for line in path.read_text().splitlines())
    }
    assert found <= ELSEWHERE
