"""Normalise an answer's spelling: Unicode, fonts, sizes, colours, spaces, Markdown. All of it takes
time linear in the text's length."""

from __future__ import annotations

import re
import unicodedata

from opsd.grading.answers.notation import NOTATION, PATTERNS

_CHARACTERS, _COMMANDS = NOTATION["characters"], NOTATION["commands"]
_SPELLED = {form: to for to, forms in NOTATION["spelled"].items() for form in forms.split()}
_SPELLED |= dict.fromkeys(_CHARACTERS["nothing"].split(), "")
_ONE_SPELLING = str.maketrans({form: to for form, to in _SPELLED.items() if len(form) == 1})
_SCRIPTS = [
    (mark, re.compile(f"[{re.escape(shown)}]+"), str.maketrans(shown, meant))
    for mark, (shown, meant) in (("^", _CHARACTERS["raised"]), ("_", _CHARACTERS["lowered"]))
]
_GREEK = {word[0]: word[1:] for word in _CHARACTERS["greek"].split()}
# A Greek letter inside a word (μm, or a Greek word) stays; alone it becomes a TeX command.
_ANY_GREEK = "".join(_GREEK)
_GREEK_ALONE = re.compile(
    rf"(?<![^\W\d_])[{_ANY_GREEK}](?![^\W\d_])|(?<![{_ANY_GREEK}])π(?![{_ANY_GREEK}])"
)


def from_unicode(text: str) -> str:
    """Replace Unicode digits, signs and mathematical letters by ASCII or TeX; words stay."""
    if text.isascii():
        return text
    for mark, run, table in _SCRIPTS:
        pieces = run.split(text)
        inside = (f"{mark}{{{found.translate(table)}}}" for found in run.findall(text))
        text = pieces[0] + "".join(map("".join, zip(inside, pieces[1:], strict=True)))
    text = "".join(map(_one, text.translate(_ONE_SPELLING)))
    return _GREEK_ALONE.sub(lambda found: f"\\{_GREEK[found[0]]} ", text)


def _one(character: str) -> str:
    if character.isascii():
        return character
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if character.isspace():
        return " "
    plain = unicodedata.normalize("NFKC", character)  # fullwidth and mathematical letters, ½
    above, _, below = plain.partition("\N{FRACTION SLASH}")
    if below:
        return f"\\frac{{{above}}}{{{below}}}"
    return plain if len(plain) == 1 and (plain.isascii() or plain in _GREEK) else character


_TOKEN = re.compile(r"\\[A-Za-z]+\*?|\\.|[{}]|[^\\{}]+|\\", re.DOTALL)
# Command → (its replacement, what replaces its argument's braces).
_WRITTEN: dict[str, tuple[str, str]] = {
    " ": (" ", ""),
    **dict.fromkeys(_COMMANDS["nothing"].split(), ("", "")),
    **dict.fromkeys(_COMMANDS["space"].split(), (" ", "")),
    **dict.fromkeys(_COMMANDS["dropped"].split(), ("", "drop")),
    **dict.fromkeys(_COMMANDS["see_through"].split(), ("", "\0")),
    **{form[1:]: (to, "") for form, to in _SPELLED.items() if len(form) > 1},
}
_TEXT, _FONT = _COMMANDS["text"].split(), _COMMANDS["font"].split()
_VECTOR = PATTERNS["vector"]
_LETTERS = re.compile(r"[^\W\d_]")
_WORDLIKE = re.compile(r"[^\W\d_]{2}|[^\W\d_] +[^\W\d_]|\(\s*[A-Za-z]\s*\)")


def without_looks(text: str) -> str:
    r"""`\textbf{(D)}\ 12` -> `\text{(D)} 12`, `\color{red}{7}` -> `{7}`, `\underline{7}` -> `7`."""
    if "\\" not in text:
        return text
    text = _VECTOR.sub(r"\\hat{\1\2}", text)
    tokens = _TOKEN.findall(text)
    out: list[str] = []
    closers: list[str] = []
    skipping = 0  # the depth of braces inside a dropped argument
    pending = ""  # the last command awaits its argument: "drop", or the new opening and closing
    for index, token in enumerate(tokens):
        if skipping:
            skipping += (token == "{") - (token == "}")
            continue
        if token == "{":
            if pending == "drop":
                skipping = 1
            elif pending:
                out.append(pending[:-1])
                closers.append(pending[-1].strip("\0"))
            else:
                out.append("{")
                closers.append("}")
            pending = ""
        elif token == "}":
            out.append(closers.pop() if closers else "}")
        elif token.startswith("\\"):
            written, pending = _command(token, tokens[index + 1 : index + 3])
            out.append(written)
        else:
            if not token.isspace():
                pending = ""
            out.append(token)
    return "".join(out)


def _command(token: str, following: list[str]) -> tuple[str, str]:
    """(the replacement of a command, the replacement of its argument's braces)."""
    name = token.lstrip("\\").rstrip("*")
    if name in _TEXT or name in _FONT:
        content = following[1] if following[:1] == ["{"] and len(following) > 1 else ""
        wordlike = bool(_WORDLIKE.search(content)) and not content.startswith("\\")
        words = wordlike or (name in _TEXT and _LETTERS.search(content))
        return "", "\\text{}" if words else "\0"
    return _WRITTEN.get(name, (token, ""))


_ESCAPED_TWICE = PATTERNS["escaped_twice"]
_THIN_THOUSANDS = re.compile(r"(?<=\d),\s*\\!\s*(?=\d{3})")
_BREAK = re.compile(r"\\\\\s*\[[^\]]{0,10}\]")  # a line break with a distance
_UNITS = [  # what tells a unit from a letter, before fonts are dropped
    (re.compile(r"\\mathrm\s*\{\s*~\s*(?=[A-JL-Za-z])"), r"\\text{"),
    (
        re.compile(r"(\d\}?(?:\s|\\[,;: ])*)\\mathrm\s*\{\s*([NJWVACTFH]\s*\})(?!\s*[_^])"),
        r"\1\\text{\2",
    ),
    (re.compile(r"\\mu\s*(\\(?:mathrm|text)\s*\{)[\s~]*(?=[A-Za-z])"), r"\1μ"),
]
_DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]|\\(?:left|right)\s*\.")
_MARKDOWN = PATTERNS["markdown"]
_BRACED_SPACE = re.compile(r"\{\s*\\[,;:! ]\s*\}")
_BRACED_COMMA = re.compile(r"(?<=\d)\{\s*,\s*\}\s*(?=\d)")
# (pattern, replacement), applied in this order.
_N, _M = r"\s*\{?(\d+|[mn])\}?", r"\s*(\d+)\s*"
_REWRITTEN = [
    (re.compile(pattern), to)
    for pattern, to in (
        (r"\*\*(?=[\w({-])", "^"),  # a power: bold text has been handled before
        (r"^(?:\\text\s*\{\s*(?:negative|minus)\s*\}|(?:negative|minus)\b(?=\s*[\d\\$]))\s*", "-"),
        (r"(?<=\w) only$", ""),
        (r"\\(frac|binom)\s*([A-Za-z\d])\s*(?=[A-Za-z\d{])", r"\\\1{\2}"),
        (r"(\\(?:frac|binom)\s*\{[^{}]*\})\s*([A-Za-z\d])", r"\1{\2}"),
        (
            r"\\text\s*\{\s*cis\s*\}\s*(\([^()]*\)|\\frac\s*\{[^{}]*\}\s*\{[^{}]*\}|[\d.]+\s*\^\\circ)",
            r"(\\cos\1+i\\sin\1)",
        ),
        (r"\\not\s*=", r"\\neq "),
        (r"\\not\s*\\in(?![A-Za-z])", r"\\notin "),
        (r"\\mathbb\s+([A-Z])", r"\\mathbb{\1}"),
        (r"(\\mathbb\s*\{[A-Z]\}|[)\]])\s*-\s*(?=\\\{)", r"\1\\setminus "),
        (r"(?<=\w)_\s*\{\s*\(\s*(\d+)\s*\)\s*\}", r"_{\1}"),  # a base
        (r"\\overline\s*\{\s*(\w+)\s*\}(?=\s*_)", r"\1"),
        (r"(\d)\{,\}(?=\d{3}(?!\d))", r"\1"),  # thousands
        (r"\{,\}", "."),
        (r"\{([:;=])\}", r"\1"),
        (r"(?<![\w.])[1-9]\d{0,2}(?:_\d{3})+(?!\w)", lambda found: found[0].replace("_", "")),
        (r"(?<=[^\s{])\^\s*-\s*(\d+)", r"^{-\1}"),
        (r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d/])", lambda found: found[0].replace(" ", "")),
        (r"\^\s*\{?(\d+)\}?\s*/\s*_\s*\{?(\d+)\}?", r"\\frac{\1}{\2}"),
        (  # n over k as ^nC_k, _nC_k, C_n^k, C^k_n or C(n, k)
            rf"(?<![A-Za-z\\])(?:\{{\s*\}}\s*)?(?:\^{_N}\s*C\s*_{_N}|_{_N}\s*C\s*_{_N}|"
            rf"C\s*_{_N}\s*\^{_N}|C\s*\^{_N}\s*_{_N}|C\s*\({_M},{_M}\))",
            r"\\binom{\1\3\5\8\9}{\2\4\6\7\10}",
        ),
        (r"\{\s*([^{}]+?)\s*\\choose(?![A-Za-z])\s*([^{}]+?)\s*\}", r"\\binom{\1}{\2}"),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\(?:overline|vec)\s*\{\s*([A-Z]{2,3})\s*\}", r"\1"),  # a line between points
        (r"(?<=\d)\s*[xX*]\s*(?=10\s*\^)", r"\\times "),
        (
            r"\^\s*(?:\{\s*(?:\\circ|o|\\text\s*\{\s*o\s*\}|\\text)\s*\}|\\circ|o(?![A-Za-z]))",
            r"^\\circ ",
        ),
        (r"\^\s*\{?\s*(?:\\top|\\intercal|\\text\s*\{\s*T\s*\}|T)(?![A-Za-z])\s*\}?", "^{T}"),
        (r"\{\s*\}\s*\^\s*\{?\s*[tT]\s*\}?\s*([A-Z])(?![A-Za-z])", r"\1^{T}"),
        ("<=", r"\\le "),
        (">=", r"\\ge "),
        ("!=", r"\\neq "),
        ("==", "="),
        (":=", "="),
    )
]


def clean(text: str) -> str:
    """Normalise an answer's spelling. `\\text{…}` stays around words next to mathematics."""
    text = _ESCAPED_TWICE.sub("", _THIN_THOUSANDS.sub(",", text))
    text = _BREAK.sub(r"\\\\", from_unicode(text).strip())
    for written, plain in _UNITS:
        text = written.sub(plain, text)
    text = _DELIMITER.sub(" ", text)
    # Dollars in pairs mark mathematics; a single one before a number is money.
    text = text.replace("\\$", "\0").replace("$", " " if text.count("$") % 2 == 0 else "\0")
    text = _MARKDOWN.sub(r"\1\2\3\4\5", text.replace("\0", " \\$ "))
    text = _BRACED_COMMA.sub("{,}", _BRACED_SPACE.sub(" ", text)).replace("~~", "\\cancel ")
    text = " ".join(without_looks(text.replace("~", " ")).split())
    for pattern, to in _REWRITTEN:
        text = pattern.sub(to, text)
    return trim(" ".join(text.split()))


_TEXT_GROUP = re.compile(r"\\text\s*\{([^{}]*)\}")


def trim(text: str) -> str:
    """Strip an answer of surrounding spaces, final punctuation, braces, `\\text{}` and quotes."""
    while True:
        before = text
        text = text.strip(" \n\t")
        while text.endswith(("\\\\", ".", ",", ";", ":")) and not text.endswith(("..", "\\;")):
            text = text.removesuffix("\\\\") if text.endswith("\\\\") else text[:-1]
            text = text.rstrip()
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'*_`"
        if quoted and text[0] not in text[1:-1]:
            text = text[1:-1]
        if text[:1] == "{" and _closes_at_end(text):
            text = text[1:-1]
        text = found[1] if (found := _TEXT_GROUP.fullmatch(text)) else text
        if text == before:
            return text


def _closes_at_end(text: str) -> bool:
    """Whether the last character closes the brace that is the first character."""
    if not text.endswith("}") or text.endswith("\\}"):
        return False
    depth = 0
    for found in re.finditer(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return found.end() == len(text)
    return False


def plain_text(text: str) -> str:
    r"""Remove `\text{…}` around words."""
    return _TEXT_GROUP.sub(r"\1", text)


def squeezed(text: str) -> str:
    """Remove spaces except those between letters or digits: `1 1/2` is not `11/2`."""
    pieces = text.split()
    out = pieces[:1]
    for piece in pieces[1:]:
        if out[-1][-1].isalnum() and piece[0].isalnum():
            out.append(" ")
        out.append(piece)
    return "".join(out)
