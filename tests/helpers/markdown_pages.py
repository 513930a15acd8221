"""Reads Markdown pages for the tests of the documentation: headings, links and code."""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^( *)(`{3,})(\S*)\s*$")
_NOT_RUN = re.compile(r"^\s*<!-- not run: (.+) -->$")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+(?:\([^()]*\))?)(?:\s+\"[^\"]*\")?\)")
_HTML_LINK = re.compile(r"(?:src|href)=\"([^\"]+)\"")
_CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")


@dataclass(frozen=True)
class Block:
    """A fenced block of code. not_run: the reason that the page gives for not running it, or
    None.
    """

    page: str
    line: int
    language: str
    text: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def name(page: Path) -> str:
    """A page's path from the root of the repository."""
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page. A line `<!-- not run: REASON -->` before a block marks it."""
    found, lines = [], page.read_text().splitlines()
    start, indent, fence, language, reason = None, "", "", "", None
    for number, line in enumerate(lines, start=1):
        match = _FENCE.match(line)
        if start is None and match:
            before = next((text for text in reversed(lines[: number - 1]) if text.strip()), "")
            marked = _NOT_RUN.match(before)
            reason = marked and marked[1]
            start, (indent, fence, language) = number, match.groups()
        elif start is not None and match and match[2] >= fence and not match[3]:
            text = "\n".join(text.removeprefix(indent) for text in lines[start : number - 1])
            found.append(Block(name(page), start, language, text + "\n", reason))
            start = None
    assert start is None, f"{name(page)}:{start}: a fence that is never closed"
    return found


def prose(page: Path) -> list[str]:
    """The page's lines, with those of fenced blocks empty."""
    lines = page.read_text().splitlines()
    for block in blocks(page):
        size = block.text.count("\n")
        lines[block.line - 1 : block.line + size + 1] = [""] * (size + 2)
    return lines


def links(page: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, target) of every link and image."""
    for number, line in enumerate(prose(page), start=1):
        bare = _CODE.sub(lambda code: "`" * len(code[0]), line)
        for pattern in (_LINK, _HTML_LINK):
            yield from ((number, match[1]) for match in pattern.finditer(bare))


def inline_code(page: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every piece of inline code."""
    for number, line in enumerate(prose(page), start=1):
        yield from ((number, match[2].strip()) for match in _CODE.finditer(line))


def anchors(page: Path) -> set[str]:
    """The anchors that a link may name after `#`: those that GitHub makes of headings."""
    found: set[str] = set()
    for line in prose(page):
        heading = re.match(r"^#{1,6}\s+(.+?)\s*#*$", line)
        if heading:
            slug = slugify(heading[1])
            count = next(n for n in range(99) if (slug if n == 0 else f"{slug}-{n}") not in found)
            found.add(f"{slug}-{count}" if count else slug)
        found.update(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", line))
    return found


def slugify(heading: str) -> str:
    """A heading's anchor on GitHub: lower case, only letters, digits, hyphens and underscores."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    kept = (c for c in text if c in "-_ " or unicodedata.category(c)[0] in "LN")
    return "".join(kept).replace(" ", "-")
