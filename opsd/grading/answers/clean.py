"""Normalise an answer's spelling: Unicode, fonts, sizes, colours, spaces, Markdown. All of it takes
time linear in the text's length."""

import re
import unicodedata

from opsd.grading.answers.notation import FORM, NOTATION

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
    text = FORM.circled.sub("", text)
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
    if "㍱" <= character <= "㏟":  # a unit in one sign, `㎡`
        return f"\\text{{ {plain}}}"
    return plain if len(plain) == 1 and (plain.isascii() or plain in _GREEK) else character


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


def without_looks(text: str) -> str:
    r"""`\textbf{(D)}\ 12` -> `\text{(D)} 12`, `\color{red}{7}` -> `{7}`, `\underline{7}` -> `7`."""
    if "\\" not in text:
        return text
    text = FORM.vector.sub(r"\\hat{\1\2}", text)
    tokens = FORM.clean_token.findall(text)
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
        wordlike = bool(FORM.wordlike.search(content)) and not content.startswith("\\")
        words = wordlike or (name in _TEXT and FORM.letters.search(content))
        return "", "\\text{}" if words else "\0"
    return _WRITTEN.get(name, (token, ""))


_MARKED, _REWRITTEN = (
    [(re.compile(pattern), to) for pattern, to in NOTATION[table]["pairs"]]
    for table in ("marked_units", "rewritten")
)


def _braced(text: str) -> str:
    r"""`sqrt(x(y+1))` -> `sqrt{x(y+1)}`, `e^(2(x+1))` -> `e^{2(x+1)}`."""
    starts = {found.end() for found in FORM.opened.finditer(text)}
    out, opened = list(text), []
    for index, character in enumerate(text if starts else ""):
        if character == "(":
            opened.append(index)
        elif character == ")" and opened and (start := opened.pop()) in starts:
            out[start], out[index] = "{", "}"
    return "".join(out)


def clean(text: str) -> str:
    """Normalise an answer's spelling. `\\text{…}` stays around words next to mathematics."""
    text = FORM.escaped_twice.sub("", FORM.thin_thousands.sub(",", text))
    text = FORM.line_break.sub(r"\\\\", FORM.space_at_end.sub("", from_unicode(text).strip()))
    for written, plain in _MARKED:
        text = written.sub(plain, text)
    text = FORM.delimiter.sub(" ", text)
    # Dollars in pairs mark mathematics; a single one before a number is money.
    text = text.replace("\\$", "\0").replace("$", " " if text.count("$") % 2 == 0 else "\0")
    text = FORM.markdown.sub(r"\1\2\3\4\5", text.replace("\0", " \\$ "))
    text = FORM.braced_comma.sub("{,}", FORM.braced_space.sub(" ", text)).replace("~~", "\\cancel ")
    text = " ".join(without_looks(text.replace("~", " ")).split())
    text = _braced(text)
    text = FORM.grouped.sub(lambda found: re.sub("[_ ]", "", found[0]), text)
    for pattern, to in _REWRITTEN:
        text = pattern.sub(to, text)
    return trim(" ".join(text.split()))


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
        text = found[1] if (found := FORM.text_group.fullmatch(text)) else text
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
    return FORM.text_group.sub(r"\1", text)


def squeezed(text: str) -> str:
    """Remove spaces except those between letters or digits: `1 1/2` is not `11/2`."""
    pieces = text.split()
    out = pieces[:1]
    for piece in pieces[1:]:
        if out[-1][-1].isalnum() and piece[0].isalnum():
            out.append(" ")
        out.append(piece)
    return "".join(out)
