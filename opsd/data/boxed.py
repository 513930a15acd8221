r"""Find the answer that a text puts into boxes: `\boxed{…}`."""

import re
from dataclasses import dataclass

_TOKENS = re.compile(
    r"\\(?:boxed|fbox|framebox)(?![A-Za-z])(?:\[[^\[\]]{0,20}\])?\s*(\{?)|\\.|[{}]", re.DOTALL
)
# What a box without braces holds, `\boxed 7`: up to the formula's `$`, else a number or command.
_TO_DOLLAR = re.compile(r"([^${}\n]{0,80}(?:\{[^${}\n]{0,40}\}[^${}\n]{0,40}){0,6})\$")
_BARE = re.compile(
    r"[-+]?\s*\d[\d.,]*(?<![.,])(?:\s*\\?%)?|[-+]?\\[A-Za-z]+\s*(?:\{[^{}\n]{0,60}\}\s*){1,3}|"
    r"[-+]?\\[A-Za-z]+\d{0,2}|[A-Za-z](?![A-Za-z])|\([^()\n]{1,60}\)"
)
# `*+` does not backtrack: text that matches in two ways would be tried in all combinations.
_PLACEHOLDER = re.compile(
    r"(?:\s|\\[ ,;:!]|\\q?quad|\\[lc]?dots|\\square|\\Box|\\cdots?|\\_|\.\.\.|[?_.…{}\[\]<>$~-]|"
    r"\\(?:text|phantom|mathrm|textbf)\s*(?=\{))*+"
    r"(?:(?:your |the |my )?(?:final )?(?:answer|result|solution)(?: goes)?(?: here)?)?"
    r"[\s}\]>.?$]*",
    re.IGNORECASE,
)
_LABEL = r"(?:\(?[A-Za-z](?:_\{?\w\}?)?\s*=\s*)?"
# The text between boxes that hold parts of one answer: `and`, commas, the next part's label.
_JOINT = re.compile(
    r"(?P<blank>\s*)|"
    r"(?:[\s$,;&]|\\[ ,;]|\\\\|\\q?quad|\\\)|\\\(|\\text\s*\{\s*,?\s*(?:and|or)\s*\}|"
    r"\b(?:and|or|perhaps|maybe|possibly)\b|(?:[.*\s]*\bpart\s*)?[.*\s]*\(?(?:[a-h1-9]|i{1,3}|iv|v)\)[\s*:]*|:)*+"
    + _LABEL
    + r"[\s$]*",
    re.IGNORECASE,
)
_PART = re.compile(r"\b(?:[b-h2-9]|i{2,3}|iv|v)\)")
_NAMED = re.compile(r"(?<![A-Za-z\\])([A-Za-z](?:_\{?\w\}?)?)\s*=\s*$")
# What takes a box back: words before it or a line through it, words after it, a question mark that
# nothing answers. `not 6 but \boxed{7}` and `\boxed{7}. No others exist.` do not.
_DENIED_BEFORE = re.compile(
    r"(?:(?:\b(?:not|never|cannot|anything but|reject)|n't)(?: (?:be|equal|to|just|simply|conclude|"
    r"say|the (?:final )?answer))*|\b(?:wrong|incorrect|false) to (?:say|claim|answer|conclude)|"
    r"\b(?:wrong|incorrect|false|naive) (?:answer|guess|value|result)s? (?:is|was|would be)|"
    r"\bcontradiction,? that\b[^.]*|~~|<(?:del|s)>|\\(?:[bx]?cancel|sout|st)\s*\{)[\s$:*(\\\[]*$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"[\s$*)\\\]},\u2014\u2013-]*(?:[❌✗✘]|\(?(?:wrong|incorrect)\b|if\b[^.]*\bbut\b|"
    r"(?:does not|doesn't|cannot|can't) (?:work|satisfy|fit|hold|solve|match|be)|fails\b|"
    r"(?:which )?(?:is|was|seems|would be) (?:\w+ )?(?:(?:wrong|incorrect|false)\b|too \w+\b|"
    r"not (?:right|correct|(?:the|my) (?:\w+ )?answer\b))|"
    r"[.!?;]*\s*(?:(?:hmm|wait|oh|oops|no|but|sorry|actually)\b[^\w]*)*(?:scratch that|"
    r"on second thought|correction:|(?:that|this|it) (?:fails|does not work|doesn't work)|"
    r"(?:that|this|it)(?:'s| is| was| seems)(?: \w+)? (?:wrong|incorrect|not (?:right|correct))"
    r"(?! to\b| that\b))|[.!;]*\s*(?:hmm|wait|oh|oops|actually)[^\w]*no\b(?! other| more)|"
    r"\?(?!.*(?:\b(?:yes|indeed|correct|right|true)\b|[✓✔✅])))",
    re.IGNORECASE | re.DOTALL,
)
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
    for token in _TOKENS.finditer(text):
        symbol = token.group()
        if symbol.startswith(("\\b", "\\f")) and len(symbol) > 2:
            last_command = token.start()
            if token[1]:
                open_starts.append((token.start(), token.end()))
            elif bare := _TO_DOLLAR.match(text, token.end()) or _BARE.match(text, token.end()):
                content = bare[1] if bare.re is _TO_DOLLAR else bare[0]
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
    return len(content) < 80 and bool(_PLACEHOLDER.fullmatch(content))


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
    denied = _DENIED_BEFORE.search(before) or _DENIED_AFTER.match(after)
    return f"\\text{{not }}{real[-1].content}" if denied else joined(text, real)[0]


def joined(text: str, real: list[Box]) -> tuple[str, int]:
    """(the answer that the last boxes hold together, the number of these boxes)."""
    parts = [real[-1]]  # the last one first
    for box in real[-2::-1]:
        between = text[box.end : parts[-1].start]
        joint = _JOINT.fullmatch(between) if len(between) <= _LONGEST_JOINT else None
        labelled = _PART.search(between) or _named_apart(text, box, parts[-1])
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
    named = _NAMED.search(text, max(0, box.start - 20), box.start)
    return named[1] if named else ""


def _named_apart(text: str, one: Box, other: Box) -> bool:
    """Whether two boxes on different lines hold the values of two different names."""
    names = _name(text, one), _name(text, other)
    return all(names) and names[0] != names[1]
