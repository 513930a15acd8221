"""Writing files whole or not at all, and reading JSON lines.

A file is written under a random name beside its place and then renamed: a reader never sees half of
one, several writers do not disturb each other, and a link that somebody has put in place of a file
of ours is replaced, not followed. The content reaches the disk before the name does.
"""

import json
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from opsd.common.errors import UserError, in_short


def write_file(path: Path, content: str | bytes | Callable[[IO[bytes]], object]) -> None:
    """Write all of the file or, where that fails, nothing; the umask decides who may read it.

    content: text is written as UTF-8; a function writes into the file that it is given.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
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
    _sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file for people to read as well."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """Write records as JSON lines."""
    write_file(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def is_unfinished(path: Path) -> bool:
    """Whether this is a file that somebody is just writing, or was killed while writing."""
    return path.name.startswith(".") and path.name.endswith(".part")


def read_lines(path: Path, bad: list[int] | None = None) -> list[dict]:
    """The records of a JSON-lines file; [] if there is none.

    A last line that a crash cut short is left out. Where another line holds no JSON object, its
    number is added to `bad` and it is left out, or without `bad` a UserError is raised.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode(errors="replace" if bad is not None else "strict"))
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
            records.append(record)
        except ValueError as error:
            if number == len(lines):
                continue
            if bad is None:
                said = in_short(error)
                raise UserError(f"{path} is damaged in line {number} ({said})") from None
            bad.append(number)
    return records


def _sync_directory(directory: Path) -> None:
    """Have the disk keep the names in a directory."""
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    except OSError:  # some file systems cannot; the rename itself has succeeded
        pass
    finally:
        os.close(opened)
