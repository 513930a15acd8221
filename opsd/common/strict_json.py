"""Read JSON and refuse duplicate keys, of which Python's own reader silently keeps the last."""

import json
from pathlib import Path
from typing import Any

from opsd.common.errors import UserError, in_short


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A function for json's `object_pairs_hook`. Raises ValueError for a duplicate key."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is in it twice")
    return made


def read_object(file: Path, where: str) -> dict[str, Any]:
    """Read a file that holds a JSON object. Raises UserError, whose message begins with `where`."""
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text, object_pairs_hook=each_once)
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{where}: {str(file)!r} is not JSON ({in_short(error)})") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: {str(file)!r} is not a JSON object")
    return found
