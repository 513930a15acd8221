"""Files are written whole or not at all, whatever is in the way and whoever else writes."""

import ast
import errno
import os
import re
import resource
import stat
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import opsd
from opsd.common.errors import UserError
from opsd.common.files import (
    append_to,
    is_unfinished,
    open_plain,
    remove,
    try_lock,
    why_not_written,
    write_file,
    write_json,
)

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


def test_what_an_interrupted_write_leaves_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # killed
    with pytest.raises(ZeroDivisionError):
        write_file(tmp_path / "file", lambda file: 1 / 0)
    assert all(map(is_unfinished, tmp_path.iterdir())) and any(tmp_path.glob("*.part"))


def test_a_link_is_not_appended_to(tmp_path):
    other = tmp_path / "other"
    (tmp_path / "log").symlink_to(other)
    with pytest.raises(UserError, match="log' is a link"):
        append_to(tmp_path / "log")
    assert not other.exists()
    with append_to(tmp_path / "new") as file:
        file.write(b"a line")
    with append_to(tmp_path / "new") as file:
        file.write(b", more")
    assert (tmp_path / "new").read_text() == "a line, more"


@pytest.mark.parametrize("opened", [open_plain, append_to])
def test_what_is_no_plain_file_is_not_opened(opened, tmp_path):
    """A device has no end, and a pipe whose other end is open is waited for."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match="no plain file"):
            opened(path)


def test_a_lock_is_had_by_one_and_some_file_systems_have_none(tmp_path, monkeypatch):
    with append_to(tmp_path / "lock") as one, append_to(tmp_path / "lock") as other:
        assert try_lock(one) is True and try_lock(other) is False
        for number in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            monkeypatch.setattr("fcntl.flock", raising(OSError(number, "")))
            assert try_lock(other) is None
        monkeypatch.setattr("fcntl.flock", raising(OSError(errno.EIO, "")))
        with pytest.raises(OSError):
            try_lock(other)


def raising(error):
    def function(*_, **__):
        raise error

    return function


def test_links_and_directories_are_removed_by_their_names(tmp_path):
    kept = tmp_path / "kept"
    (kept / "inside").mkdir(parents=True)
    (tmp_path / "link").symlink_to(kept)
    (tmp_path / "directory" / "inside").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name in ("link", "directory", "file", "not there"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (kept / "inside").is_dir()


def test_why_something_could_not_be_written_is_found_inside_of_other_errors(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    tensors = {"a": torch.zeros(1 << 16)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        for write in (
            lambda: write_file(tmp_path / "x", partial(torch.save, tensors)),
            lambda: save_file(tensors, tmp_path / "x"),
            lambda: write_file(tmp_path / "x", bytes(1 << 17)),
        ):
            with pytest.raises(Exception) as caught:
                write()
            assert "ulimit -f" in why_not_written(caught.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = {28: "the disk is full", 122: "quota is used up", 30: "Read-only file system"}
    for number, text in said.items():
        assert text in why_not_written(RuntimeError(f"I/O error: x (os error {number})"))
        assert text in why_not_written(OSError(number, "x"))
    assert why_not_written(RuntimeError("something else")) is None


# Calls that write a file, or give one a name. `a.replace(b)` may be a text's: not seen here.
WRITING = {
    *("write_text", "write_bytes", "touch", "rename", "symlink_to", "hardlink_to", "mkstemp"),
    *("save", "save_file", "save_pretrained", "save_checkpoint", "save_to_json", "savefig"),
    *("tofile", "to_csv", "to_json_file", "to_parquet", "copyfile", "copytree", "copy2", "mkfifo"),
    *("FileIO", "extract", "extractall", "unpack_archive", "to_pickle", "memmap"),
    *("save_fsdp_model", "save_fsdp_optimizer", "NamedTemporaryFile", "link", "symlink"),
}
# Each with its reason. What fills a `new_directory`, or one of ours that has a random name, is
# read by nobody before that is renamed.
ALLOWED = {
    ("training/checkpoints.py", "save_pretrained"): "into a new directory",
    ("training/checkpoints.py", "save_checkpoint"): "into a new directory, by DeepSpeed",
    ("training/checkpoints.py", "save_fsdp_model"): "into a new directory, by accelerate",
    ("training/checkpoints.py", "save_fsdp_optimizer"): "into a new directory, by accelerate",
    ("training/checkpoints.py", "save"): "the teacher's average, see below",
    ("training/failed_steps.py", "save"): "into the file that write_file has opened",
    ("training/trainer.py", "save_checkpoint"): "our own, of a new directory",
    ("data/images.py", "save"): "into memory",
    ("common/weight_stream.py", "save"): "into memory",
    ("models/images.py", "save_pretrained"): "into a new directory",
    ("models/lora.py", "save_pretrained"): "into a directory made for this set of weights",
    ("models/moving_average.py", "save_file"): "into a checkpoint's new directory",
    ("quickstart/tiny_model.py", "save_pretrained"): "into a new directory",
    ("rollout/vllm_server.py", "save_file"): "into a directory made for this set of weights",
    ("report/curves_png.py", "savefig"): "into the file that write_file has opened",
    ("cli/export.py", "rename"): "what is whole, from a new directory beside it",
    ("common/worker_process.py", "os.open"): "/dev/null",
    ("cli/main.py", "os.open"): "/dev/null",
}


def writes(source: str) -> set[str]:
    """The calls in a module's source that write, by name; `open` and the like only for writing."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = getattr(function, "attr", getattr(function, "id", ""))
        of_os = isinstance(function, ast.Attribute) and getattr(function.value, "id", "") == "os"
        if name in ("open", "fdopen"):
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
            texts = [v.value for v in values if isinstance(v, ast.Constant)]
            modes = [t for t in texts if isinstance(t, str) and re.fullmatch("[rwxabt+]{1,4}", t)]
            if of_os and name == "open":
                if "WRONLY" in ast.unparse(node) or "RDWR" in ast.unparse(node):
                    found.add("os.open")
            elif any(set(mode) & set("wxa+") for mode in modes):
                found.add(name)
        elif name in WRITING or (of_os and name in ("replace", "rename")):
            found.add(name)
    return found


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("open(path, 'w')", "open"),
        ("path.open('ab')", "open"),
        ("open(path, encoding='utf-8', mode='r+')", "open"),
        ("Path(path).write_text(text)", "write_text"),
        ("os.replace(a, b)", "replace"),
        ("io.FileIO(path, 'w').write(data)", "FileIO"),
        ("os.open(path, os.O_WRONLY | os.O_CREAT)", "os.open"),
        ("torch.save(x, path)", "save"),
        ("open(path)", None),
        ("path.open('rb')", None),
        ("text.replace('w', 'a')", None),
        ("os.open(path, os.O_RDONLY)", None),
    ],
)
def test_calls_that_write_are_seen(source, name):
    assert writes(source) == ({name} if name else set())


def test_no_other_module_writes_files():
    found = {
        (str(path.relative_to(PACKAGE)), name)
        for path in PACKAGE.rglob("*.py")
        for name in writes(path.read_text())
        if path.name != "files.py" or path.parent.name != "common"
    }
    assert found - set(ALLOWED) == set()
    assert set(ALLOWED) - found == set(), "no longer needed"
