"""One spelling for what only looks different: Unicode, fonts, sizes, colours, spaces, marks of
Markdown. All of it takes time linear in the text's length."""

# ruff: noqa: RUF001 - characters that look alike are what this is about
from __future__ import annotations

import re
import unicodedata

_VULGAR = {
    character: f"\\frac{{{above}}}{{{below}}}"
    for character in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞↉"
    for above, below in [unicodedata.normalize("NFKC", character).split("⁄")]
}
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱᵀ", "0123456789+-=()niT", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎", "0123456789+-=()", strict=True))
_SIGNS = {
    **dict.fromkeys("−–—‐‑‒―﹣－ー⁃", "-"),
    **dict.fromkeys("⁄∕", "/"),
    **dict.fromkeys("，、،﹐", ","),
    **dict.fromkeys("؛；", ";"),
    **dict.fromkeys("ː：∶꞉", ":"),
    **dict.fromkeys("。．｡", "."),
    **dict.fromkeys("“”„″", '"'),
    **dict.fromkeys("‘’ʼ′", "'"),
    **dict.fromkeys("٪％", "\\%"),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u200f✓✔✅☑■□∎", ""),
    **dict.fromkeys("·⋅∙•", "\\cdot "),
    **dict.fromkeys("°º˚", "^\\circ "),
    "٫": ".",
    "٬": ",",
    "×": "\\times ",
    "∗": "*",
    "＊": "*",
    "÷": "/",
    "≤": "\\le ",
    "⩽": "\\le ",
    "≦": "\\le ",
    "≥": "\\ge ",
    "⩾": "\\ge ",
    "≧": "\\ge ",
    "≠": "\\neq ",
    "≈": "\\approx ",
    "≃": "\\approx ",
    "≅": "\\approx ",
    "≡": "\\equiv ",
    "∞": "\\infty ",
    "√": "\\sqrt ",
    "∛": "\\sqrt[3]",
    "∈": "\\in ",
    "∪": "\\cup ",
    "∩": "\\cap ",
    "∅": "\\emptyset ",
    "⌀": "\\emptyset ",
    "∖": "\\setminus ",
    "±": "\\pm ",
    "∓": "\\mp ",
    "⟨": "(",
    "⟩": ")",
    "〈": "(",
    "〉": ")",
    "【": "[",
    "】": "]",
    "⌊": "\\lfloor ",
    "⌋": "\\rfloor ",
    "⌈": "\\lceil ",
    "⌉": "\\rceil ",
    "…": "\\ldots ",
    "⋯": "\\ldots ",
    "ℝ": "\\mathbb{R}",
    "ℤ": "\\mathbb{Z}",
    "ℕ": "\\mathbb{N}",
    "ℚ": "\\mathbb{Q}",
    "ℂ": "\\mathbb{C}",
    "∧": "\\text{ and }",
    "∨": "\\text{ or }",
    "→": "\\to ",
    "⇒": "\\Rightarrow ",
    "∴": "\\therefore ",
    "∠": "\\angle ",
    "△": "\\triangle ",
    "∑": "\\sum ",
    "∫": "\\int ",
    "℃": "^\\circ \\text{C}",
    "℉": "^\\circ \\text{F}",
    "ı": "i",
    "ϕ": "\\phi ",
    "ε": "\\epsilon ",
    "µ": "μ",
}
_GREEK = dict(
    zip(
        "αβγδζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ",
        "alpha beta gamma delta zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon "
        "phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega".split(),
        strict=True,
    )
)
# Greek letters inside words (μm, and Greek itself) are letters; alone they are TeX's commands.
_GREEK_ALONE = re.compile(rf"(?<![^\W\d_])[{''.join(_GREEK)}](?![^\W\d_])")


def from_unicode(text: str) -> str:
    """TeX's ASCII for digits, signs and letters of other scripts and looks; words stay."""
    if text.isascii():
        return text
    out: list[str] = []
    raised = ""  # "^" or "_" while a run of raised or lowered characters is open
    for character in text:
        for mark, table in (("^", _SUPERSCRIPTS), ("_", _SUBSCRIPTS)):
            if character in table:
                if raised != mark:
                    out.append(("}" if raised else "") + mark + "{")
                    raised = mark
                out.append(table[character])
                break
        else:
            if raised:
                out.append("}")
                raised = ""
            out.append(_one(character))
    if raised:
        out.append("}")
    return _GREEK_ALONE.sub(lambda found: f"\\{_GREEK[found[0]]} ", "".join(out))


def _one(character: str) -> str:
    if character.isascii():
        return character
    if character in _VULGAR:
        return _VULGAR[character]
    if character in _SIGNS:
        return _SIGNS[character]
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if character.isspace():
        return " "
    plain = unicodedata.normalize("NFKC", character)  # fullwidth and mathematical letters
    return plain if len(plain) == 1 and (plain.isascii() or plain in _GREEK) else character


_TOKEN = re.compile(r"\\[A-Za-z]+\*?|\\.|[{}]|[^\\{}]+|\\", re.DOTALL)
_DROPPED = frozenset(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle "
    "textstyle scriptstyle limits nolimits rm bf it sf tt bfseries itshape large Large huge Huge "
    "small normalsize centering therefore because checkmark blacksquare square qed Box "
    "Rightarrow Longrightarrow implies middle boldmath nonumber notag".split()
)
_DROPPED_WITH_ARGUMENT = frozenset(
    "color phantom hphantom vphantom hspace vspace tag label textcolor colorbox hskip".split()
)
_SPACES = frozenset("quad qquad enspace thinspace space nobreakspace , ; : > !".split()) | {" "}
_SEE_THROUGH = frozenset(
    "boxed fbox framebox underline underbrace overbrace uline emph ensuremath mathstrut "
    "smash mathop mathord mathrel mathbin bbox uuline mathclap strut".split()
)
_TEXT = frozenset("text textbf textit textrm texttt textsf textsc textup textmd textnormal mbox "
                  "hbox".split())  # fmt: skip
_FONT = frozenset(
    "mathrm mathbf mathit mathsf mathtt mathcal mathscr mathfrak mathnormal boldsymbol bm pmb "
    "operatorname".split()
)
_RENAMED = {
    "dfrac": "\\frac", "tfrac": "\\frac", "cfrac": "\\frac", "dbinom": "\\binom",
    "tbinom": "\\binom", "leq": "\\le ", "geq": "\\ge ", "leqslant": "\\le ", "geqslant": "\\ge ",
    "ne": "\\neq ", "lt": "<", "gt": ">", "varnothing": "\\emptyset ", "langle": "(",
    "rangle": ")", "lbrace": "\\{", "rbrace": "\\}", "lbrack": "[", "rbrack": "]", "colon": ":",
    "degree": "^\\circ ", "dots": "\\ldots ", "cdots": "\\ldots ", "dotsc": "\\ldots ",
    "dotsb": "\\ldots ", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "vee":
    "\\text{ or }", "lor": "\\text{ or }", "wedge": "\\text{ and }", "land": "\\text{ and }",
    "simeq": "\\approx ", "cong": "\\approx ", "backslash": "\\setminus ", "ast": "*",
    "lparen": "(", "rparen": ")", "textdegree": "^\\circ ", "pounds": "£", "euro": "€",
    "textperiodcentered": "\\cdot ", "percent": "\\%", "neg": "-", "imath": "i", "jmath": "j",
    "infin": "\\infty ", "euros": "€", "widehat": "\\hat", "overrightarrow": "\\vec",
    "overline": "\\overline", "bar": "\\overline", "bmod": "\\pmod ", "varphi": "\\phi ",
    "varepsilon": "\\epsilon ", "log": "\\log", "lg": "\\log_{10}",
}  # fmt: skip
_VECTOR = re.compile(
    r"\\(?:hat|vec|mathbf|boldsymbol|bm|overrightarrow|widehat)\s*\{?\s*(?:\\(?:mathbf|"
    r"boldsymbol|bm|mathrm)\s*\{?\s*)?(?:\\([ij])math|([ijk]))(?![A-Za-z])\s*\}?\}?"
)
_LETTERS = re.compile(r"[^\W\d_]")
_WORDLIKE = re.compile(r"[^\W\d_]{2}|[^\W\d_] +[^\W\d_]|\(\s*[A-Za-z]\s*\)")


def without_looks(text: str) -> str:
    r"""`\textbf{(D)}\ 12` -> `\text{(D)} 12`, `\color{red}{7}` -> `{7}`, `\underline{7}` -> `7`."""
    if "\\" not in text:
        return text
    if "ath" in text or "hat" in text or "vec" in text or "\\b" in text:
        text = _VECTOR.sub(lambda found: f"\\hat{{{found[1] or found[2]}}}", text)
    tokens = _TOKEN.findall(text)
    out: list[str] = []
    closers: list[str] = []
    skipping = 0  # the depth inside an argument that is dropped
    pending = ""  # a command that waits for its argument: "drop", or what closes it
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
            written, pending = _command(token.lstrip("\\").rstrip("*") or token, tokens, index)
            out.append(written)
        else:
            if not token.isspace():
                pending = ""
            out.append(token)
    return "".join(out)


def _command(name: str, tokens: list[str], index: int) -> tuple[str, str]:
    """(what is written for a command, what its argument's braces become)."""
    if name in _DROPPED:
        return ("" if name in ("left", "right", "middle") else " "), ""
    if name in _SPACES:
        return ("" if name == "!" else " "), ""
    if name in _DROPPED_WITH_ARGUMENT:
        return "", "drop"
    if name in _SEE_THROUGH:
        return "", "\0"
    if name in _TEXT or name in _FONT:
        content = tokens[index + 2] if tokens[index + 1 : index + 2] == ["{"] else ""
        wordlike = bool(_WORDLIKE.search(content)) and not content.startswith("\\")
        if wordlike or (name in _TEXT and _LETTERS.search(content)):
            return "", "\\text{}"
        return "", "\0"
    if name in _RENAMED:
        return _RENAMED[name], ""
    return tokens[index], ""


_BREAK = re.compile(r"\\\\\s*\[[^\]]{0,10}\]")
_DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]|\\(?:left|right)\s*\.")
_MARKDOWN = re.compile(
    r"\*\*([^*]+)\*\*|__([^_]+)__|`([^`]+)`|<b>([^<]*)</b>|<strong>([^<]*)</strong>"
)
_GROUPED = re.compile(r"(?<![\d.,])(\d{1,3}(?: \d{3})+)(?![\d/])")
_BRACED_SPACE = re.compile(r"\{\s*\\[,;:! ]\s*\}")
_BRACED_COMMA = re.compile(r"(?<=\d)\{\s*,\s*\}\s*(?=\d)")
_TEXT_GROUP = re.compile(r"\\text\s*\{([^{}]*)\}")
_ROOT_OF = re.compile(r"\\sqrt\s*\(([^()]*)\)")
_SEGMENT = re.compile(r"\\(?:overline|vec)\s*\{\s*([A-Z]{2,3})\s*\}")
_CHOOSE = re.compile(
    r"(?<![A-Za-z\\])(?:\{\s*\}\s*)?(?:\^\s*\{?(\d+)\}?\s*C\s*_\s*\{?(\d+)\}?|_\s*\{?(\d+)\}?\s*C\s*_"
    r"\s*\{?(\d+)\}?|C\s*_\s*\{?(\d+)\}?\s*\^\s*\{?(\d+)\}?|C\s*\^\s*\{?(\d+)\}?\s*_\s*\{?(\d+)\}?|"
    r"C\s*\(\s*(\d+)\s*,\s*(\d+)\s*\))"
)  # fmt: skip
_SMALL_FRACTION = re.compile(r"\^\s*\{?(\d+)\}?\s*/\s*_\s*\{?(\d+)\}?")
_PLAIN_X = re.compile(r"(?<=\d)\s*[xX*]\s*(?=10\s*\^)")
_DEGREES = re.compile(
    r"\^\s*(?:\{\s*(?:\\circ|o|\\text\s*\{\s*o\s*\}|\\text)\s*\}|\\circ|o(?![A-Za-z]))"
)
_COMPARISONS = (("<=", "\\le "), (">=", "\\ge "), ("!=", "\\neq "), ("==", "="), (":=", "="))


def _choose(found: re.Match) -> str:
    a, b, c, d, e, f, g, h, i, j = found.groups()
    above, below = (a, b) if a else (c, d) if c else (e, f) if e else (h, g) if h else (i, j)
    return f"\\binom{{{above}}}{{{below}}}"


def clean(text: str) -> str:
    """The answer in one spelling. `\\text{…}` stays around words that stand beside mathematics."""
    text = from_unicode(text).strip()
    text = _BREAK.sub(r"\\\\", text)
    text = _DELIMITER.sub(" ", text)
    # A pair of dollars marks mathematics; a dollar before a number alone is money.
    text = text.replace("\\$", "\0").replace("$", " " if text.count("$") % 2 == 0 else "\0")
    text = text.replace("\0", " \\$ ")
    text = _MARKDOWN.sub(lambda found: next(g for g in found.groups() if g is not None), text)
    text = _BRACED_COMMA.sub("{,}", _BRACED_SPACE.sub(" ", text)).replace("~~", "\\cancel ")
    text = without_looks(text.replace("~", " "))
    text = " ".join(text.split())
    text = re.sub(r"(\d)\{,\}(?=\d{3}(?!\d))", r"\1", text)
    text = text.replace("{,}", ".")
    text = _GROUPED.sub(lambda found: found[1].replace(" ", ""), text)
    text = _SMALL_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _CHOOSE.sub(_choose, text)
    text = _ROOT_OF.sub(r"\\sqrt{\1}", text)
    text = _SEGMENT.sub(r"\1", text)
    text = _PLAIN_X.sub(r"\\times ", text)
    text = _DEGREES.sub(r"^\\circ ", text)
    for sign, command in _COMPARISONS:
        text = text.replace(sign, command)
    return trim(" ".join(text.split()))


def trim(text: str) -> str:
    """Without what surrounds an answer: spaces, a final stop, braces, `\\text{}`, quotes."""
    while True:
        before = text
        text = text.strip(" \n\t")
        while text.endswith(("\\\\", ".", ",", ";", ":")) and not text.endswith(("..", "\\;")):
            text = text[: -2 if text.endswith("\\\\") else -1].rstrip()
        if (
            len(text) > 1
            and text[0] == text[-1]
            and text[0] in "\"'*_`"
            and text[0] not in text[1:-1]
        ):
            text = text[1:-1]
        if text[:1] == "{" and _closes_at_end(text):
            text = text[1:-1]
        whole = _TEXT_GROUP.fullmatch(text)
        if whole:
            text = whole[1]
        if text == before:
            return text


def _closes_at_end(text: str) -> bool:
    """Whether the brace that opens the text is closed by its last character."""
    if not text.endswith("}") or text.endswith("\\}"):
        return False
    depth = 0
    for found in re.finditer(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return found.end() == len(text)
    return False


def plain_text(text: str) -> str:
    r"""Without `\text{…}` around words."""
    return _TEXT_GROUP.sub(r"\1", text)
