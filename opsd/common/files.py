"""Write files atomically; read regular files only, never links, pipes or devices.

A file is written under a random name in the same directory and then renamed: a reader never sees
half a file, several writers do not disturb each other, and a link that somebody has put in place of
our file is replaced, not followed. The content reaches the disk before the name does. No other
module writes files, except for a short list in tests/common/test_files.py.
"""

import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import tomllib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from opsd.common.errors import UserError


def write_file(path: Path, content: str | bytes | Callable[[IO[bytes]], object]) -> None:
    """Write the whole file or, if that fails, nothing; the umask decides who may read it.

    content: text, written as UTF-8; bytes; or a function that writes to the file it is given.
    """
    content = content.encode(errors="replace") if isinstance(content, str) else content
    beside = unfinished(path)
    new = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with open(new, "w+b") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file, which people can read too."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """Write records as JSON lines."""
    write_file(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def append_to(path: Path) -> IO[bytes]:
    """Open a file for reading and appending. Raises UserError as `open_plain` does."""
    return open(_plain(path, os.O_RDWR | os.O_APPEND | os.O_CREAT), "a+b")


def reserve(path: Path, size: int) -> None:
    """Allocate `size` bytes of disk for a file; does nothing if the file system cannot do it at
    once. Raises OSError if the disk, a quota or a limit on file sizes does not allow them.

    Not os.posix_fallocate: if the file system cannot allocate, the C library writes every block."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not size or not hasattr(libc, "fallocate"):
        return
    with append_to(path) as file:
        if libc.fallocate(file.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(size)):
            number = ctypes.get_errno()
            if number not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise OSError(number, os.strerror(number))


def try_lock(file: IO[bytes]) -> bool | None:
    """Lock an open file until it is closed or the process ends. Returns False if another process
    holds the lock, None if the file system does not support locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        return None
    return True


def move(source: Path, target: Path) -> None:
    """Rename within one file system, and sync the new name to disk."""
    os.replace(source, target)
    sync(target.parent)


def remove(path: Path) -> None:
    """Remove a file, a link, or a directory and its contents. Under its name a reader finds all of
    it or nothing, even after a crash: a directory is renamed before it is emptied."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not is_unfinished(path):
        path = path.rename(unfinished(path))
    shutil.rmtree(path, ignore_errors=True)


def unfinished(path: Path) -> Path:
    """A random temporary name in the directory of `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")


def is_unfinished(path: Path) -> bool:
    """Whether this is a temporary name: a process is writing it, or was killed while writing."""
    return path.name.startswith(".") and path.name.endswith(".part")


def open_plain(path: Path) -> IO[bytes]:
    """Open a file for reading. Raises UserError for a link, which may lead to a file that is not
    ours, for a pipe, which may never have a writer, and for a directory or a device."""
    return open(_plain(path, os.O_RDONLY), "rb")


def _plain(path: Path, flags: int) -> int:
    try:
        opened = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        said = "a link, which is not followed" if path.is_symlink() else "no plain file"
        raise UserError(f"{str(path)!r} is {said}") from None
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise UserError(f"{str(path)!r} is no plain file")
    return opened


def lines_of(path: Path, longest: int) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line with its line end); nothing if there is no file. Raises UserError
    for a line of more than `longest` bytes."""
    try:
        file = open_plain(path)
    except FileNotFoundError:
        return
    with file:
        for number, line in enumerate(iter(partial(file.readline, longest + 1), b""), 1):
            if len(line) > longest:
                raise UserError(f"{str(path)!r} has more than {longest:,} bytes in line {number}")
            yield number, line


def read_toml(module: str, name: str) -> dict[str, Any]:
    """Read `name`.toml, which we ship beside a module. module: the module's __file__."""
    return tomllib.loads(Path(module).with_name(f"{name}.toml").read_text(encoding="utf-8"))


def other_kind(file: Path) -> str:
    """What a file is instead of what its suffix says, and what to do, if it starts so; else ""."""
    with file.open("rb") as opened:
        start = f"{file.suffix.lower()} {opened.read(80).decode('latin-1')}"
    starts = read_toml(__file__, "starts").items()
    return next((said for pattern, said in starts if re.match(pattern, start)), "")


def sync(path: Path) -> None:
    """Sync to disk a file's content, or the names in a directory."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:  # some file systems cannot sync; the data are written all the same
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(opened)


REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file of that size is not allowed there, see `ulimit -f`",
}


def why_not_written(error: BaseException | None) -> str | None:
    """The system's reason why a file could not be written, even if an error of torch or safetensors
    wraps it; None for an error of another kind."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if number is None and (said := re.search(r"\(os error (\d+)\)", str(error))):
            number = int(said[1])
        if number is not None:
            return REASONS.get(number, os.strerror(number))
        error = error.__cause__ or error.__context__
    return None
