"""docs/troubleshooting.md quotes messages that the code has; `…` stands for what differs."""

import ast
import re
from functools import cache

import pytest
from helpers.markdown_pages import ROOT, prose

PAGE = ROOT / "docs" / "troubleshooting.md"
QUOTED = [line[5:-1] for line in prose(PAGE) if line.startswith("### `")]


@cache
def literals() -> list[str]:
    """All strings of both packages and of the build, `…` for each value that is filled in."""
    found = []
    modules = (path for name in ("opsd", "opsd_kernels") for path in (ROOT / name).rglob("*.py"))
    for path in (ROOT / "setup.py", *modules):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (getattr(part, "value", None) for part in node.values)
                found.append("".join(p if isinstance(p, str) else "…" for p in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    # `refused` adds the value to a field's name.
    return found + [re.sub(r"^([a-z_]+(?:\.[a-z_]+)+): ", r"\1 is …: ", text) for text in found]


def says(literal: str, message: str) -> bool:
    """Whether the parts of the message that do not differ stand in the literal, in order."""
    place = 0
    for part in message.split("…"):
        place = literal.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


@pytest.mark.parametrize("message", QUOTED)
def test_the_code_has_the_message(message):
    assert sum(map(len, message.split("…"))) > 11, "too little to find it by"
    assert any(says(literal, message) for literal in literals())


def test_every_entry_is_a_message_and_says_what_to_do():
    entries = PAGE.read_text().split("\n### ")[1:]
    assert len(entries) == len(QUOTED) > 40
    assert all(len(entry.split("\n", 1)[1].strip()) > 30 for entry in entries)
