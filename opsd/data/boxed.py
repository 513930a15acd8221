"""The last \\boxed{} of a text."""

import re

_BOX_TOKENS = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` whose braces balance (inner before outer), or None.

    One pass, so a megabyte of opening boxes is harmless. Escaped braces do not count.

    >>> last_boxed(r"It was \boxed{3}, no: \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    open_starts: list[int | None] = []  # None: a brace that opens no box
    last_start, content = -1, None
    for token in _BOX_TOKENS.finditer(text):
        symbol = token.group()
        if symbol.endswith("{") and symbol != "\\{":
            open_starts.append(token.end() if len(symbol) > 1 else None)
        elif symbol == "}" and open_starts:
            start = open_starts.pop()
            if start is not None and start > last_start:
                last_start, content = start, text[start : token.start()]
    return None if content is None else content.strip()
