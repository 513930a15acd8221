"""Separate a completion's thought from the part that is graded. Needs no torch.

Training's reward, the held-out evaluation and `opsd eval` follow one rule: the text after the last
thought is graded, up to a thought that never ends; without a thought, the whole text.
"""

import re
from collections.abc import Iterable

from opsd.common.files import read_toml

_NAME = "(?:[a-z_:]{0,30}think[a-z_]{0,30}|thought|reasoning)"  # replaces NAME in TAGS
TAGS: dict[str, str] = read_toml(__file__, "thoughts")
"""Tag that begins a thought → tag that ends it."""


def _pattern(tags: Iterable[str]) -> str:
    return "|".join(re.escape(tag).replace("NAME", _NAME) for tag in tags)


BEGIN, END = _pattern(TAGS), _pattern(TAGS.values())
_BEGIN = re.compile(BEGIN, re.IGNORECASE)
_TAG = rf"(?i)(?!(?<=[\s(][`\"'])(?:{BEGIN}|{END})[`\"'])"  # no mention in quotes: `</think>`
_OPENED = re.compile(rf"{_TAG}(?:(?<!\S )(?:{BEGIN})|(?:{BEGIN})(?! ))")  # nor in prose
_END = re.compile(rf"{_TAG}(?:{END})")
_EMPTY = re.compile(rf"(?:{BEGIN})\s*(?:{END})\s*(?={BEGIN})", re.IGNORECASE)
_CLOSED = re.compile(rf"(?:(?:{BEGIN})\s*)?(?:{END})\s*$", re.IGNORECASE)


def final_part(text: str, in_thought: bool = False) -> str:
    """The part of a completion that is graded.

    in_thought: the context already opens a thought, as some chat templates do.

    >>> final_part("<think>Perhaps \\\\boxed{6}? No.</think>It is \\\\boxed{7}.")
    'It is \\\\boxed{7}.'
    >>> final_part("<think>Perhaps \\\\boxed{6}?")
    ''
    """
    ends = list(_END.finditer(text))
    if ends:
        text, in_thought = text[ends[-1].end() :], False
    opened = _OPENED.search(text)
    return "" if in_thought else text[: opened.start()].rstrip() if opened else text


def split_thought(text: str) -> tuple[str, str]:
    """(the thought at an answer's start, without tags; the rest). ("", text) without a thought.

    >>> split_thought("<think>\\nWe add.\\n</think>\\n\\nIt is 7.")
    ('\\nWe add.\\n', 'It is 7.')
    """
    start = text.lstrip()
    if alone := _END.match(start):
        return "", start[alone.end() :].lstrip()
    begun = _BEGIN.match(start)
    ended = begun and re.compile(re.escape(_closing(begun)), re.I).search(start, begun.end())
    if not (begun and ended):
        return "", text
    return start[begun.end() : ended.start()], start[ended.end() :].lstrip()


def is_tag(text: str) -> bool:
    """Whether a text is a tag that begins or ends a thought."""
    return bool(_BEGIN.fullmatch(text) or _END.fullmatch(text))


def without_empty_thought(text: str) -> str:
    """Remove an empty thought that a template writes before the answer's own thought."""
    return _EMPTY.sub("", text)


def open_thought(text: str) -> tuple[str, str] | None:
    """The tags of the thought that `text` leaves open, such as ("<think>", "</think>"), or None.

    >>> open_thought("<|im_start|>assistant\\n<think>\\n")
    ('<think>', '</think>')
    >>> open_thought("<think>\\n\\n</think>\\n\\n") is None
    True
    """
    tags = list(_BEGIN.finditer(text))
    # Only a tag at the end of the text counts: a problem may mention such tags.
    if not tags or text[tags[-1].end() :].strip():
        return None
    return tags[-1].group(), _closing(tags[-1])


def without_closed_thought(context: str) -> str | None:
    """The context without the empty thought at its end; None if it has none."""
    closed = _CLOSED.search(context)
    return context[: closed.start()] if closed else None


def _closing(begun: re.Match) -> str:
    """The tag that ends the thought that this tag begins."""
    tag = begun.group()
    known = {opening.lower(): closing for opening, closing in TAGS.items()}
    return known.get(tag.lower(), f"</{tag[1:]}")
