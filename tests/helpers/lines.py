"""Reads what a run has written, line by line."""

import json
from pathlib import Path


def read_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines; [] if there is none."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]
