"""Read JSON and refuse duplicate keys, of which Python's own reader silently keeps the last."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opsd.common.errors import UserError, in_short

MOST_BYTES = 1 << 27
"""The largest file to read: the index of a thousand files of weights has some megabytes."""


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A function for json's `object_pairs_hook`. Raises ValueError for a duplicate key."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is in it twice")
    return made


def read_text(file: Path) -> str:
    """Read a text file. Raises ValueError if it is too large for one, or not in UTF-8."""
    if (size := file.stat().st_size) > MOST_BYTES:
        raise ValueError(f"it has {size:,} bytes, at most {MOST_BYTES:,} are read")
    return file.read_text(encoding="utf-8")


def read_object(file: Path, where: str) -> dict[str, Any]:
    """Read a file that holds a JSON object. Raises UserError, whose message begins with `where`."""
    try:
        found = json.loads(read_text(file), object_pairs_hook=each_once)
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{where}: {str(file)!r} is not JSON ({in_short(error)})") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: {str(file)!r} is not a JSON object")
    return found


def texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from texts([*value, *value.values()])
    elif isinstance(value, list):
        for one in value:
            yield from texts(one)
