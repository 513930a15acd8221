"""JSON whose keys stand once each. Of two alike, every other reader drops one in silence."""

import json
from pathlib import Path
from typing import Any

from opsd.common.errors import UserError, in_short


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json's `object_pairs_hook`. Raises ValueError for a key that stands there twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands in it twice")
    return made


def read_object(file: Path, where: str) -> dict[str, Any]:
    """The JSON object that a file holds. Raises UserError; `where` begins its message."""
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text, object_pairs_hook=each_once)
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{where}: {str(file)!r} is not JSON ({in_short(error)})") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: {str(file)!r} is not a JSON object")
    return found
