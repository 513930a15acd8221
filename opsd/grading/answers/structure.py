"""Split texts at separators outside of brackets. Each function takes one pass."""

import re

from opsd.grading.answers.notation import FORM

_OPENING = {"(": 1, "[": 1, "{": 1, "\\{": 1}
_CLOSING = {")": 1, "]": 1, "}": 1, "\\}": 1}


def _step(token: str) -> int:
    if token in _OPENING or token.startswith("\\begin"):
        return 1
    if token in _CLOSING or token.startswith("\\end"):
        return -1
    return 0


def balanced(text: str) -> bool:
    """Whether every bracket is closed, by one of any kind: so are `[0, 1)` and `]0, 1[`."""
    if (text[:1] == "]" and text[-1:] in "[]") or (text[:1] in "[]" and text[-1:] == "["):
        text = text[1:-1]
    depth = 0
    for token in FORM.token.finditer(text):
        depth += _step(token[0])
        if depth < 0:
            return False
    return depth == 0


def enclosed(text: str) -> tuple[str, str, str] | None:
    """(opening, inside, closing) if a pair of brackets encloses the whole text; else None."""
    opening = "\\{" if text.startswith("\\{") else text[:1]
    if opening not in ("(", "[", "\\{"):
        return None
    depth = 0
    for token in FORM.token.finditer(text):
        depth += _step(token[0])
        if depth == 0:
            if token.end() != len(text):
                return None
            return opening, text[len(opening) : token.start()], token[0]
    return None


def split(text: str, at: str | re.Pattern, keep: bool = False) -> list[str]:
    """Split at separators outside of all brackets; keep: include the separators."""
    pattern = re.compile(re.escape(at)) if isinstance(at, str) else at
    inside = _inside(text)
    parts, start = [], 0
    for found in pattern.finditer(text):
        if inside[found.start()]:
            continue
        parts += [text[start : found.start()], *([found[0]] if keep else [])]
        start = found.end()
    parts.append(text[start:])
    return parts


def _inside(text: str) -> bytearray:
    """For each character, and the end, 1 if it is inside brackets or a `\\text` command's name."""
    inside = bytearray(len(text) + 1)
    depth, last = 0, 0
    for token in FORM.token.finditer(text):
        if depth > 0:
            inside[last : token.start()] = b"\1" * (token.start() - last)
        step = _step(token[0])
        if token[0].startswith("\\text") or (depth > 0 and step >= 0):
            inside[token.start() : token.end()] = b"\1" * (token.end() - token.start())
        depth += step
        last = token.end()
    if depth > 0:
        inside[last:] = b"\1" * (len(inside) - last)
    return inside


_LABELS = [list("abcdefgh"), list("123456789"), ["i", "ii", "iii", "iv", "v"]]


def labelled_parts(text: str) -> list[str]:
    """The parts `3` and `5` of `(a) 3 (b) 5` or `1) 3; 2) 5`; [] if the labels are no sequence."""
    found = list(FORM.part.finditer(text)) if text[:1] in "(a1i" else []
    labels = [label[1] for label in found]
    if len(found) < 2 or found[0].start() or labels not in [row[: len(found)] for row in _LABELS]:
        return []
    ends = [label.start() for label in found[1:]] + [len(text)]
    return [text[label.end() : end].strip(" ,;") for label, end in zip(found, ends, strict=True)]


def alternatives(text: str) -> list[str]:
    """Split at `or` and semicolons outside of brackets."""
    text = FORM.structure_said_or.sub(" or ", text)
    return [piece for piece in split(text, FORM.alternative) if piece]


def split_list(text: str, words_too: bool = True) -> tuple[list[str], bool]:
    """(the parts of a list, whether only words separate them). Keeps `1,234` as one number."""
    text = FORM.thousands.sub(lambda found: found[0].replace(",", "\0"), text)
    by_words = False
    if words_too:
        text = FORM.and_after.sub(r"\\text{\1}\\text{ and }", text)
        text = FORM.and_before.sub(r"\\text{ and }\\text{\1}", text)
        text = "\1".join(split(FORM.joining_text.sub("\1", text), FORM.joining))
        by_words = "\1" in text and len(split(text, FORM.separator)) == 1
    if text.count("=") > 1:  # `x=1 y=2`, but not the name of `\\angle A = \\angle B = 40`
        text = FORM.next_name.sub(lambda f: f[0] if f[1][0] == "\\" else f"{f[1]}\1", text)
    parts = split(text, re.compile(r"[,;&\1]|\\\\"))
    return [part.strip().replace("\0", ",") for part in parts if part.strip()], by_words
