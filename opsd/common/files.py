"""Writing files and directories whole or not at all, and reading plain ones only.

Each is written under a random name beside its place and then renamed: a reader never sees half of
one, several writers do not disturb each other, and a link that somebody has put in place of a file
of ours is replaced, not followed. The content reaches the disk before the name does. No other
module writes files, a short list in tests/common/test_files.py apart.
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
    """Write all of the file or, where that fails, nothing; the umask decides who may read it.

    content: text is written as UTF-8; a function writes into the file that it is given.
    """
    beside = unfinished(path)
    new = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with open(new, "w+b") as file:
            if isinstance(content, str):
                file.write(content.encode(errors="replace"))
            elif isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file for people to read as well."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """Write records as JSON lines."""
    write_file(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def append_to(path: Path) -> IO[bytes]:
    """The file, open to be read and to be written at its end. Raises UserError as `open_plain`."""
    return open(_plain(path, os.O_RDWR | os.O_APPEND | os.O_CREAT), "a+b")


def reserve(path: Path, size: int) -> None:
    """Take so many bytes of the disk for a file, where the file system can do that at once. Raises
    OSError where the disk, a quota or a limit of files' sizes has not so many.

    Not os.posix_fallocate: where a file system cannot, the C library writes all the blocks."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not size or not hasattr(libc, "fallocate"):
        return
    with append_to(path) as file:
        if libc.fallocate(file.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(size)):
            number = ctypes.get_errno()
            if number not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise OSError(number, os.strerror(number))


def try_lock(file: IO[bytes]) -> bool | None:
    """Lock an open file until it is closed, or the process ends. False: another process has the
    lock. None: the file system knows no locks."""
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
    """Rename within a directory's file system, and have the disk keep the new name."""
    os.replace(source, target)
    sync(target.parent)


def remove(path: Path) -> None:
    """Remove a file, a link, or a directory with all that is in it. Who looks for it under its name
    finds all of it or nothing, also after a crash."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not is_unfinished(path):
        path = path.rename(unfinished(path))
    shutil.rmtree(path, ignore_errors=True)


def unfinished(path: Path) -> Path:
    """A random name beside `path`, for what is to be there."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")


def is_unfinished(path: Path) -> bool:
    """Whether this is a file that somebody is just writing, or was killed while writing."""
    return path.name.startswith(".") and path.name.endswith(".part")


def open_plain(path: Path) -> IO[bytes]:
    """The file, open to be read. Raises UserError for a link, which may lead to a file that is not
    ours, and for a directory, a pipe, whose writer may never come, and a device."""
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
    """The lines of a file, with their numbers and their ends; none if there is no file. Raises
    UserError for one of more than `longest` bytes."""
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
    """The table `name`.toml that we ship beside a module; `module`: its __file__."""
    return tomllib.loads(Path(module).with_name(f"{name}.toml").read_text(encoding="utf-8"))


def sync(path: Path) -> None:
    """Have the disk keep a file's content, or the names in a directory."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:  # some file systems cannot; what was written is there
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
    """The system's reason where something could not be written, also inside of an error of torch's
    or safetensors'; None for an error of another kind."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if number is None and (said := re.search(r"\(os error (\d+)\)", str(error))):
            number = int(said[1])
        if number is not None:
            return REASONS.get(number, os.strerror(number))
        error = error.__cause__ or error.__context__
    return None
