r"""Find the answer that a text puts into boxes: `\boxed{…}`."""

from dataclasses import dataclass

from opsd.common.files import read_toml
from opsd.common.forms import forms

FORM = forms(read_toml(__file__, "answers")["boxed"])
_LONGEST_JOINT = 60


@dataclass(frozen=True)
class Box:
    """A closed box; start: of the command, end: after the closing brace, both in characters."""

    start: int
    end: int
    content: str


def boxes(text: str) -> tuple[list[Box], bool]:
    """(the innermost boxes in order, whether the last one is not closed). Takes linear time, also
    for a megabyte of opening boxes. Ignores escaped braces."""
    open_starts: list[tuple[int, int] | None] = []  # None: a brace that opens no box
    found: list[Box] = []
    latest = -1  # the start of the last closed box
    last_command = -1
    for token in FORM.tokens.finditer(text):
        symbol = token.group()
        if symbol.startswith(("\\b", "\\f")) and len(symbol) > 2:
            last_command = token.start()
            if token[1]:
                open_starts.append((token.start(), token.end()))
            elif bare := FORM.to_dollar.match(text, token.end()) or FORM.bare.match(
                text, token.end()
            ):
                content = bare[1] if bare.re is FORM.to_dollar else bare[0]
                if content.strip() and "\\boxed" not in content:
                    found.append(Box(token.start(), token.end() + len(content), content.strip()))
                    latest = token.start()
        elif symbol == "{":
            open_starts.append(None)
        elif symbol == "}" and open_starts:
            start = open_starts.pop()
            if start is not None and start[0] > latest:
                content = text[start[1] : token.start()].strip()
                found.append(Box(start[0], token.end(), content))
                latest = start[0]
    return found, last_command > latest


def is_placeholder(content: str) -> bool:
    r"""Whether a box has no answer: `\boxed{}`, `\boxed{\ldots}`, `\boxed{\text{your answer}}`."""
    return len(content) < 80 and bool(FORM.placeholder.fullmatch(content))


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}`; None without one.

    Of nested boxes the innermost counts. Boxes separated only by "and", "or" or a comma are parts
    of one answer, and an empty box after a real one does not count.

    >>> last_boxed(r"It was \boxed{3}, no: \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> last_boxed(r"$x=\boxed{3}$ or $x=\boxed{5}$")
    '3, 5'
    """
    found, _ = boxes(text)
    real = [box for box in found if not is_placeholder(box.content)] or found[-1:]
    if not real:
        return None
    before, after = text[max(0, real[-1].start - 60) : real[-1].start], text[real[-1].end :][:100]
    denied = FORM.denied_before.search(before) or FORM.denied_after.match(after)
    return f"\\text{{not }}{real[-1].content}" if denied else joined(text, real)[0]


def joined(text: str, real: list[Box]) -> tuple[str, int]:
    """(the answer that the last boxes hold together, the number of these boxes)."""
    parts = [real[-1]]  # the last one first
    for box in real[-2::-1]:
        between = text[box.end : parts[-1].start]
        joint = FORM.joint.fullmatch(between) if len(between) <= _LONGEST_JOINT else None
        labelled = FORM.part.search(between) or _named_apart(text, box, parts[-1])
        if joint is None or (between.count("\n") > 1 and not labelled):
            break
        if joint["blank"] is not None and box.content == parts[-1].content:
            parts[-1] = box  # said twice
        else:
            parts.append(box)
    parts.reverse()
    if len(parts) == 1:
        return parts[0].content, 1
    names = [_name(text, box) for box in parts]
    if all(names) and len(set(names)) == len(names):
        named = (f"{name}={box.content}" for name, box in zip(names, parts, strict=True))
        return ", ".join(named), len(parts)
    return ", ".join(box.content for box in parts), len(parts)


def _name(text: str, box: Box) -> str:
    """The name before a box, `x` in `x = \\boxed{3}`; "" if there is none."""
    named = FORM.named.search(text, max(0, box.start - 20), box.start)
    return named[1] if named else ""


def _named_apart(text: str, one: Box, other: Box) -> bool:
    """Whether two boxes on different lines hold the values of two different names."""
    names = _name(text, one), _name(text, other)
    return all(names) and names[0] != names[1]
