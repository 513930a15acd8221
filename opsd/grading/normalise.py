"""How people write answers, where math-verify would read something else.

`to_latex` rewrites an answer into what math-verify understands; `same_form` decides the forms that
it has no notion of; `too_large` says what no process should be asked to compute. Text in, text out:
the grading worker imports this file by its path, with nothing else of this package.
"""

from __future__ import annotations

import math
import re

_COMMANDS = "pi|sin|cos|tan|cot|sec|csc|log|ln|exp|infty|theta|alpha|beta"
_PLAIN_COMMAND = re.compile(rf"(?<![\\A-Za-z])({_COMMANDS})(?![A-Za-z])")
_MIXED_NUMBER = re.compile(r"(?<![\d.])(\d+)\s+(\d+)/(\d+)(?![\d.])")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?!\w)")
# Three letters or more: `12 xy` is a product.
_NUMBER_WITH_UNIT = re.compile(
    rf"([+-]?[\d.,/]*\d)\s+(?!(?:{_COMMANDS}|sqrt)\b)[A-Za-z]{{3,}}(?:\s[A-Za-z]+)*"
)
_UPRIGHT_UNIT = re.compile(
    r"([+-]?[\d.,/]*\d)\s*\\(?:mathrm|text)\{\s*[A-Za-z]+(?:\s*/\s*[A-Za-z]+)?\s*\}(?:\^\{?-?\d\}?)?"
)
_ALL_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_PROSE = re.compile(
    r"(?:\\text\{\s*)?(?:so,?\s|thus,?\s|hence,?\s|therefore,?\s)?"
    r"(?:there (?:are|is)|(?:the )?(?:final )?answer(?: is|:)?|it is)\s*:?\s*"
    r"(?:\}\s*)?(?=[-+\d\\$(.])",
    re.IGNORECASE,
)
_PLAIN_SQRT = re.compile(r"(?<![\\A-Za-z])sqrt\(([^()]*)\)")
_ROOT_SIGN = re.compile(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+|[A-Za-z]))")
_REPEATING = re.compile(r"(?<![\d.])(\d{0,30})\.(\d{0,30})\\overline\s*\{(\d{1,30})\}")
_SIGNS = {
    "\N{DEGREE SIGN}": "^\\circ",
    "~": " ",
    "\\varnothing": "\\emptyset",
    "\\langle": "(",
    "\\rangle": ")",
}


def to_latex(answer: str) -> str:
    """`sqrt(2)*pi` → `\\sqrt{2}*\\pi`, and so on for `1 1/2`, `1e3`, `18 dollars`, `0.\\overline3`.

    math-verify reads plain words as products of letters, and the numbers side by side as products.
    """
    for sign, command in _SIGNS.items():
        answer = answer.replace(sign, command)
    answer = " ".join(answer.split())  # thousands of spaces cost latex2sympy seconds
    if whole := _ALL_TEXT.fullmatch(answer):
        answer = whole[1].strip()
    if prose := _PROSE.match(answer):
        answer = answer[prose.end() :]
    for unit in (_NUMBER_WITH_UNIT, _UPRIGHT_UNIT):
        if match := unit.fullmatch(answer):
            return match[1]
    answer = _MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", answer)
    answer = _SCIENTIFIC.sub(r"\1\\times10^{\2}", answer)
    answer = _PLAIN_SQRT.sub(r"\\sqrt{\1}", answer)
    answer = _ROOT_SIGN.sub(lambda match: f"\\sqrt{{{match[1] or match[2] or match[3]}}}", answer)
    answer = _REPEATING.sub(_repeating, answer)
    return _PLAIN_COMMAND.sub(r"\\\1", answer)


def _repeating(match: re.Match) -> str:
    """0.1\\overline{6} = (16 - 1) / 90."""
    start, period = match[1] + match[2], match[3]
    numerator = int(start + period) - int(start or "0")
    return f"\\frac{{{numerator}}}{{{'9' * len(period)}{'0' * len(match[2])}}}"


_BARE_LOGARITHM = re.compile(r"\\log(?![A-Za-z]|\s*_)")


def same_logarithm(one: str, other: str) -> tuple[str, str]:
    """Both with `\\ln` where one has it and the other a `\\log` without a base, which math-verify
    takes as the decimal one."""
    if "\\ln" in one + other and _BARE_LOGARITHM.search(one + other):
        return _BARE_LOGARITHM.sub(r"\\ln", one), _BARE_LOGARITHM.sub(r"\\ln", other)
    return one, other


_DOTS = re.compile(r"\\(?:ldots|cdots|dots)(?![A-Za-z])|…|\.\.\.")
_DOTS_IN_LIST = re.compile(r"[,:;+]\s*(?:\\(?:ldots|cdots|dots)(?![A-Za-z])|…|\.\.\.)")
_COLONS = re.compile(r"(\d+(?:\s*:\s*\d+)+)\s*(?:([ap])\.?\s?m\.?)?", re.IGNORECASE)
_BASE = re.compile(r"([0-9A-F]+)_(?:\{(\d+)\}|(\d+))")


def same_form(given: str, wanted: str) -> bool | None:
    """The verdict on lists with dots, on ratios and times of day, on numbers with their base: all
    of which math-verify would misread. None: neither of these."""
    if _DOTS_IN_LIST.search(given) or _DOTS_IN_LIST.search(wanted):
        plain = ["".join(_DOTS.sub("…", text).split()) for text in (given, wanted)]
        return plain[0] == plain[1]
    one, other = _COLONS.fullmatch(given), _COLONS.fullmatch(wanted)
    if one and other:
        halves = {match[2].lower() for match in (one, other) if match[2]}
        return _numbers(one[1]) == _numbers(other[1]) and len(halves) < 2
    one, other = _BASE.fullmatch(given), _BASE.fullmatch(wanted)
    if one and other:
        values = {_in_base(match[1], match[2] or match[3]) for match in (one, other)}
        return None if None in values else len(values) == 1
    return None


def _numbers(text: str) -> list[str]:
    return [number.strip().lstrip("0") for number in text.split(":")]


def _in_base(digits: str, base: str) -> int | None:
    try:
        return int(digits, int(base))
    except ValueError:  # no base, or digits that it does not have
        return None


MOST_DIGITS = 100_000
_POWER = re.compile(r"\d+(?:\.\d+)?(?:\}|\))?(?:\s*(?:\^|\*\*)\s*[{(]?\s*\d+(?:\s*[})])?)+")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_FACTORIAL = re.compile(r"(\d+)\s*\)?\s*!")
_BINOMIAL = re.compile(r"\\[dt]?binom\s*\{\s*(\d+)\s*\}")
_EXPONENT = re.compile(r"\d[eE]\+?(\d+)")


def too_large(answer: str) -> bool:
    """Whether the answer names a number of more than MOST_DIGITS digits, which sympy would try to
    write out: towers of powers, factorials, exponents."""
    for power in _POWER.finditer(answer):
        value = 1.0
        for number in reversed(_NUMBER.findall(power.group())):
            base = float(number) if len(number) < 300 else math.inf
            # the value so far is the exponent of this base
            digits = value * math.log10(base) if base > 1 else 0.0
            if digits > MOST_DIGITS:
                return True
            value = base**value if digits < 300 else math.inf
    arguments = [*_FACTORIAL.findall(answer), *_BINOMIAL.findall(answer)]
    exponents = _EXPONENT.findall(answer)
    return any(len(n) > 6 or int(n) > MOST_DIGITS // 5 for n in arguments) or any(
        len(n) > 6 or int(n) > MOST_DIGITS for n in exponents
    )
