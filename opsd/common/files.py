"""Writing files whole or not at all, and reading JSON lines."""

import json
import os
from pathlib import Path

from opsd.common.errors import UserError, in_short


def write_whole(path: Path, text: str) -> None:
    """All of the file or nothing, also with several writers."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    beside.write_text(text, encoding="utf-8", errors="replace")
    beside.replace(path)


def part(path: Path) -> Path:
    """Where a file is written, to be renamed when it is whole."""
    return path.with_name(path.name + ".part")


def read_lines(path: Path) -> list[dict]:
    """The file's whole lines; a last one that a crash cut short is left out. [] if no file.

    Raises UserError where another line is damaged.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            records += [json.loads(line)] if line else []
        except ValueError as error:
            raise UserError(f"{path} is damaged in line {number} ({in_short(error)})") from None
    return records


def write_lines(path: Path, lines: list[dict]) -> None:
    """Write JSON lines beside, then rename."""
    beside = path.with_name(path.name + ".part")
    beside.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    beside.replace(path)


def write_json(path: Path, value: dict) -> None:
    """Write beside, then rename."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    part.replace(path)
