"""Parse an answer: cleaned text to a node."""

import re
from fractions import Fraction
from typing import cast

from opsd.grading.answers import words
from opsd.grading.answers.bases import based
from opsd.grading.answers.clean import plain_text, trim
from opsd.grading.answers.nodes import (
    Choice,
    Equal,
    Grid,
    Items,
    Node,
    Phrase,
    Ratio,
    Relation,
    Unclear,
    Value,
    by_name,
    names_of,
)  # fmt: skip
from opsd.grading.answers.notation import FORM, NOTATION
from opsd.grading.answers.number_sets import number_set
from opsd.grading.answers.numbers import Number, as_latex, number
from opsd.grading.answers.quantities import compound, counted, quantity, times
from opsd.grading.answers.renamed import is_bare, letters
from opsd.grading.answers.structure import (
    alternatives,
    balanced,
    enclosed,
    labelled_parts,
    split,
    split_list,
)

_DEEPEST = 12
_CURRENCIES = ("\\$", *"$€£¥₹₽₩₺₱₫₪", "Rs")
_CLOCK_WORDS = {"noon": "12 noon", "midday": "12 noon", "midnight": "12 midnight"}
_SYSTEMS, _MATRICES = (NOTATION["environments"][kind].split() for kind in ("systems", "matrices"))


def read(text: str, depth: int = 0) -> Node:
    """Parse a cleaned text."""
    text = trim(text)
    if depth > _DEEPEST:
        return Unclear(text, "nested too deeply")
    text = trim(FORM.quantifier.sub("", text[:200]) + text[200:])
    if ("for" in text or "where" in text) and not words.takes_back(text):
        text = trim(FORM.for_all.sub("", text))
    text = FORM.first_name.sub("", text, count=1) if FORM.first_name.match(text) else text
    if "n" in text[-40:]:
        text = trim(text[:-100] + FORM.parameter.sub("", text[-100:]))
    text = trim(_without_lead_in(text))
    if (domain := FORM.domain.search(text[-60:])) and not _top_relation(text[: -len(domain[0])]):
        text = trim(text[: -len(domain[0])])
    if not text:
        return Unclear(text, "nothing is said")
    if (plain := number(text)) is not None:
        return Value(text, plain)
    if (spelled := words.spelled_out(text) if text[0].isalpha() else None) is not None:
        return Value(as_latex(spelled), Number(spelled))
    for reader in (_clock_or_ratio, based, _dots, _choice, _transposed, _environment):
        if (node := reader(text, depth)) is not None:
            return node
    if not balanced(text):
        return Unclear(text, "brackets do not match")
    if (french := FORM.french.fullmatch(text)) and (french[1] == "]" or french[3] == "["):
        text = {"]": "("}.get(french[1], "[") + french[2] + {"[": ")"}.get(french[3], "]")
    for reader in (_compound, _several, _labelled, _signs, _enclosed, _chain, _relation, _vector):
        if (node := reader(text, depth)) is not None:
            return node
    return _single(text)


def _without_lead_in(text: str) -> str:
    if text.startswith("\\text{") and "}" in text:
        opened = text[6:].replace("}", "", 1)
        bare = words.without_lead_in(opened)
        return bare if bare != opened and len(bare) <= len(text) - text.index("}") else text
    return words.without_lead_in(text)


def _clock_or_ratio(text: str, depth: int) -> Node | None:
    plain = trim(plain_text(text)).replace("  ", " ")
    plain = _CLOCK_WORDS.get(plain.casefold(), plain)
    if (found := FORM.clock.fullmatch(plain)) and any(found.groups()[1:]):
        hour, half = int(found[1]), (found[3] or found[4] or "").lower()
        if half:
            hour = hour % 12 + 12 * (half in ("p", "noon"))
        clock = (Number(Fraction(hour)), Number(Fraction(found[2] or 0)))
        return Ratio(clock, True, bool(half) or not 0 < hour < 13, bool(half))
    parts = [trim(part) for part in FORM.of_a_ratio.split(text)]
    if len(parts) < 2 or not all(FORM.in_a_ratio.fullmatch(p) and balanced(p) for p in parts):
        return None
    numbers = tuple(part for one in parts if (part := number(one)) is not None)
    if len(numbers) == len(parts):
        return Ratio(numbers)
    if len(parts) == 2:
        return Value(f"\\frac{{{parts[0]}}}{{{parts[1]}}}")
    return Items(":", tuple(read(part, depth + 1) for part in parts))


def _compound(text: str, depth: int) -> Node | None:
    """Parse texts that look like a list but are none: `3 hours and 30 minutes`, `March 14, 2020`, a
    point's name, `all real numbers except 1 and 2`."""
    bare = " ".join(plain_text(text).split())
    if words.is_phrase(bare) and (value := counted(bare)):
        return value
    if text.startswith(_CURRENCIES) and (value := quantity(text)) and value.number:
        return value
    if words.is_verdict(bare):
        return Phrase(words.canonical(bare))
    if (of_numbers := number_set(bare)) is not None and of_numbers != text:
        return read(of_numbers, depth + 1)
    if day := words.date(bare):
        return Phrase(day)
    if FORM.point.match(text) and isinstance(point := _enclosed(text[1:].lstrip(), depth), Items):
        return Equal(text, text[0], (point,), (False,))
    return compound(text) if text[0].isdecimal() else None


def _dots(text: str, depth: int) -> Node | None:
    text = "".join(text.split()).replace("...", "\\ldots")
    return Unclear(text, "a list with dots") if FORM.dots_in_list.search(text) else None


def _choice(text: str, depth: int) -> Node | None:
    if FORM.bare_choice.fullmatch(text):
        return Choice(text)
    plain = trim(FORM.text_start.sub(r"\1", text))
    found = FORM.choice.fullmatch(plain)
    if found is None:
        return None
    letter, rest = found[1] or found[3], trim(found[2] or found[4] or "")
    if not rest:
        return Choice(letter)
    if FORM.no_choice.match(rest):
        return None  # a list, or an expression that begins with a capital letter in brackets
    another = FORM.label.search(rest) or FORM.bare_choice.fullmatch(rest)
    if another or words.takes_back(plain_text(rest)):
        return Unclear(text, "more than one choice, or one that is taken back")
    return Choice(letter, read(rest, depth + 1))


def _transposed(text: str, depth: int) -> Node | None:
    """Parse a matrix with `^T`."""
    grid = _environment(text.removesuffix("^{T}").rstrip(), depth)
    if not text.endswith("^{T}") or not isinstance(grid, Grid) or grid.cases:
        return None
    even = len(set(map(len, grid.rows))) == 1
    return Grid(tuple(zip(*grid.rows, strict=True))) if even else None


def _environment(text: str, depth: int) -> Node | None:
    if "\\begin" not in text[:30]:
        return None
    if (scaled := FORM.scaled.fullmatch(text)) and (
        by := number(scaled[1].replace("-", "-1", text[1] == "\\"))
    ):
        if isinstance(grid := _environment(scaled[2], depth), Grid):
            cells = [cell for row in grid.rows for cell in row]
            if all(isinstance(cell, Value) for cell in cells):  # prose cannot be multiplied
                product = ([times(cast(Value, c), by.value) for c in row] for row in grid.rows)
                return Grid(tuple(map(tuple, product)))
    found = FORM.environment.fullmatch(text)
    if found is None or "\\begin{" + found["name"] in found["body"]:
        return None
    name = found["name"]
    rows = [[trim(cell) for cell in split(row, "&")] for row in split(found["body"], "\\\\")]
    rows = [row for row in rows if any(row)]
    if not rows:
        return Unclear(text, "nothing is said")
    brackets = found["open"] in ("[", "(") and found["close"]
    if name in _MATRICES or (name == "array" and brackets):
        return Grid(tuple(tuple(read(cell, depth + 1) for cell in row) for row in rows))
    if name not in _SYSTEMS:
        return None
    if name.endswith("cases") and all(len(row) == 2 and _is_condition(row[1]) for row in rows):
        pairs = (
            (read(value, depth + 1), read(FORM.condition.sub("", when), depth + 1))
            for value, when in rows
        )
        return Grid(tuple(pairs), cases=True)
    return _lines([" ".join(row) for row in rows], found["open"] == "[", depth)


def _is_condition(text: str) -> bool:
    """Whether the second column of `cases` is a condition, unlike in aligned equations."""
    says = "=" in text or FORM.relations.search(text) or re.search(r"[^\W\d_]{3}", text)
    return bool(says) and not text.startswith(("=", "+", "-"))


def _lines(lines: list[str], alternatives: bool, depth: int) -> Node:
    """Parse the rows of a system; a row that begins with `=` continues the previous one."""
    joined: list[str] = []
    for line in lines:
        line = line.strip(" ,;")
        if joined and re.match(r"=|\\approx|\\le|\\ge|<|>|[+\-]", line):
            joined[-1] += " " + line
        elif line:
            joined.append(line)
    if len(joined) == 1:
        return read(joined[0], depth + 1)
    parts = [read(line, depth + 1) for line in joined]
    if any(isinstance(part, Relation) and not part.equation for part in parts):
        return Relation((" \\text{ or } " if alternatives else " \\text{ and } ").join(joined))
    return Items("list", tuple(parts))


def _several(text: str, depth: int) -> Node | None:
    if labelled := labelled_parts(text):
        values = [(read(part, depth + 1),) for part in labelled]
        return Items(
            "list", tuple(Equal(text, f"part {i}", v, (False,)) for i, v in enumerate(values))
        )
    if solutions := _solutions(text, depth):
        return solutions
    parts, by_words = split_list(text)
    if len(parts) < 2:
        return None
    if FORM.relations.search(" ".join(split(text, "(")[:1])) and not FORM.member.match(text):
        inequality = [part for part in parts if _top_relation(part)]
        if inequality:
            return Relation(text)
    with_digits = [bool(re.search(r"\d|\\pi|\\sqrt", part)) for part in parts]
    if by_words and any(with_digits) and not all(with_digits):
        phrases = [words.names_a_thing(plain_text(p)) and len(p) > 2 for p in parts[1:]]
        if with_digits[0] and all(phrases):
            return None  # `5 apples and pears`
    nodes: list[Node] = []
    in_order = any(re.match(r"(?:\\text\{)?\s*(?:and )?then\b", part) for part in parts)
    for part in parts:
        node = read(part, depth + 1)
        if not isinstance(node, Items) or node.kind != "list":
            nodes.append(node)
            continue
        named = [one for one in node.parts if isinstance(one, Equal)]
        if part.startswith("\\begin") and len(named) == len(node.parts):
            nodes.append(_solution(node))  # one of several solutions
        else:
            nodes += node.parts
    return Items("then" if in_order else "list", tuple(_shared_name(nodes)), text)


def _solutions(text: str, depth: int) -> Node | None:
    """Parse alternative solutions: `x=1, y=2 or x=3, y=4`, `(x,y) = (1,2) or (3,4)`."""
    lhs, _, first = text.partition("=")
    if (point := enclosed(lhs.strip())) and point[0] == "(" and "=" not in first:
        nodes = [read(part, depth + 1) for part in split_list(first)[0]]
        tuples = all(isinstance(node, Items) and node.kind == "()" for node in nodes)
        return Items("list", tuple(nodes)) if tuples and len(nodes) > 1 else None
    pieces = alternatives(text)
    if len(pieces) < 2 or not all("=" in piece for piece in pieces):
        return None
    solutions, names = [], set()
    for piece in pieces:
        one = read(piece, depth + 1)
        if not isinstance(one, Items) or one.kind != "list" or not names_of(one.parts):
            return None
        solutions.append(_solution(one))
        names.add(tuple(sorted(names_of(one.parts) or ())))
    return Items("list", tuple(solutions)) if len(names) == 1 else None


def _solution(named: Items) -> Items:
    """The values in `x=1, y=2`, in the order of their names, as a tuple."""
    values = (one.values[-1] if isinstance(one, Equal) else one for one in by_name(named.parts))
    return Items("()", tuple(values))


def _labelled(text: str, depth: int) -> Node | None:
    """Parse a named answer: `Alice: 5`."""
    plain = trim(FORM.text_start.sub(r"\1", text))
    found = FORM.labelled.match(plain)
    if found is None or words.takes_back(found[1]):
        return None
    return Equal(text, found[1].casefold(), (read(plain[found.end() :], depth + 1),), (False,))


def _shared_name(nodes: list[Node]) -> list[Node]:
    """For `n = 1, 4, 5`, in which only the first value has the name: all three values."""
    first = nodes[0]
    if isinstance(first, Equal) and not any(isinstance(node, Equal) for node in nodes[1:]):
        return [first.values[-1], *nodes[1:]]
    return nodes


def _top_relation(text: str) -> bool:
    return len(split(text, FORM.relations)) > 1


def _signs(text: str, depth: int) -> Node | None:
    """Parse `2 \\pm \\sqrt{3}` as two answers."""
    if not FORM.plus_minus.search(text) or text.startswith("\\{"):
        return None
    both = []
    for upper, lower in (("+", "-"), ("-", "+")):
        one = re.sub(r"\\pm(?![A-Za-z])", upper, text)
        one = re.sub(r"\\mp(?![A-Za-z])", lower, one)
        both.append(read(re.sub(r"(^|[=({,])\s*\+\s*", r"\1", one), depth + 1))
    return Items("list", tuple(both))


def _enclosed(text: str, depth: int) -> Node | None:
    found = enclosed(text)
    if found is None:
        return None
    opening, inside, closing = found
    if opening == "\\{" and closing == "\\}":
        if not inside.strip():
            return Relation("\\emptyset")
        if condition := FORM.set_of.match(inside):
            return _described(condition[1], inside[condition.end() :], depth)
    parts, _ = split_list(inside, words_too=opening == "\\{")
    nodes = tuple(read(part, depth + 1) for part in parts)
    if opening == "\\{":
        flat: list[Node] = []
        for node in nodes:
            flat += node.parts if isinstance(node, Items) and node.kind == "list" else [node]
        return Items("set", tuple(flat), text)
    if len(nodes) == 1:
        return (
            nodes[0]
            if opening + closing in ("()", "[]")
            else Unclear(text, "brackets do not match")
        )
    if not nodes:
        return Unclear(text, "nothing is said")
    return Items(opening[-1] + closing[-1], nodes, opening + inside + closing)


def _described(made: str, when: str, depth: int) -> Node:
    """Parse `\\{x : x>0\\}` as its condition, `\\{2k : k \\in \\mathbb{Z}\\}` as both parts."""
    if all(is_bare(name.strip()) for name in made.strip(" ()").split(",")):
        return read(when, depth + 1)
    if len(names := letters(made)) == 1:  # it may have any name
        own = re.compile(rf"(?<![A-Za-z\\]){re.escape(names.pop())}(?![A-Za-z])")
        made, when = own.sub("n", made), own.sub("n", when)
    domain = FORM.member.sub("", when)
    return Items("of", (read(made, depth + 1), read(domain, depth + 1)))


def _chain(text: str, depth: int) -> Node | None:
    pieces = split(
        text, re.compile(r"=|\\approx(?![A-Za-z])|\\equiv(?![A-Za-z])|\\sim(?![A-Za-z])"), keep=True
    )
    if len(pieces) < 2:
        return None
    parts, signs = [trim(piece) for piece in pieces[::2]], pieces[1::2]
    if not all(parts):
        return Unclear(text, "an equation without one of its sides")
    if any(_top_relation(part) for part in parts):
        return Relation(text)
    denied = parts if len(parts) > 2 or not is_name(parts[0]) else parts[:1]
    if FORM.supposed.search(parts[0].lower()) or any(map(words.takes_back, denied)):
        return Unclear(text, "an equation that is supposed, or denied")
    approximate = (False, *(sign.startswith("\\approx") for sign in signs))
    symbolic = [has_symbol(part) for part in parts]
    if len(parts) == 2 and symbolic[1] and not symbolic[0]:
        parts, symbolic = parts[::-1], symbolic[::-1]
    if not symbolic[0]:
        if any(symbolic):
            return Relation(text, equation=True)
        return Equal(text, None, tuple(read(part, depth + 1) for part in parts), approximate)
    names = [part for part in parts[:-1] if is_name(part)]
    if len(names) == len(parts) - 1 > 1 and not symbolic[-1]:
        value = read(parts[-1], depth + 1)
        return Items("list", tuple(Equal(text, _name(n), (value,), (False,)) for n in names))
    values = tuple(read(part, depth + 1) for part in parts[1:])
    lhs = enclosed(parts[0])
    if lhs and lhs[0] == "(" and len(parts) == 2 and isinstance(values[0], Items):
        inside, _ = split_list(lhs[1])
        if len(inside) == len(values[0].parts) > 1 and all(map(is_name, inside)):
            pairs = zip(inside, values[0].parts, strict=True)
            return Items("list", tuple(Equal(text, _name(n), (v,), (False,)) for n, v in pairs))
    if (
        isinstance(values[-1], Items)
        and values[-1].kind == "list"
        and FORM.plus_minus.search(parts[-1])
    ):
        return values[-1]
    simple = is_name(parts[0])
    if not simple and symbolic[-1]:
        return Relation(text, equation=True)
    return Equal(text, _name(parts[0]), values, approximate[1:], simple)


def _name(text: str) -> str:
    name = re.sub(r"[\s{}]", "", plain_text(text))
    return name.casefold() if name.isalpha() and len(name) > 2 else name


def is_name(text: str) -> bool:
    """Whether the left side of an equation is a mere name: `x`, `f(x)`, `a_n`, `AB:CD`, `dy/dx`."""
    text = plain_text(text)
    return bool(FORM.name.fullmatch(text) or FORM.names.fullmatch(text))


def has_symbol(text: str) -> bool:
    """Whether a side of an equation contains a name, so that it is no plain value."""
    if FORM.greek_name.search(text) or text in ("e", "i", "\\#"):
        return True
    node = _single(text) if balanced(text) else None
    if isinstance(node, Value) and (node.unit or node.noun or node.percent):
        text = node.text
    text = re.sub(r"\\[A-Za-z]+", " ", text)
    return any(word not in ("e", "i") for word in re.findall(r"[^\W\d_]+", text)) or "|" in text


def _relation(text: str, depth: int) -> Node | None:
    text = FORM.magnitude.sub(r"-\3\2\1\2\3", text)
    if member := FORM.member.match(text):
        return read(text[member.end() :], depth + 1)
    if text in ("\\emptyset", "\\infty", "-\\infty", "+\\infty") or "\\mathbb" in text:
        return Relation(text.lstrip("+"))
    return Relation(text) if _top_relation(text) else None


def interval(relation: str) -> tuple[str, Items] | None:
    """(the name, its interval): `2 < x` and `3 \\ge x > 2` say where x lies; None for others."""
    sides = [side.strip() for side in FORM.order.split(relation)]
    if "," in relation or len({sign in (">", "\\ge") for sign in sides[1::2]}) != 1:
        return None
    sides = sides[::-1] if sides[1] in (">", "\\ge") else sides
    names = [is_bare(side) and "|" not in side for side in sides[::2]]
    if names == [True, False]:
        sides = ["-\\infty", "<", *sides]
    elif names == [False, True]:
        sides += ["<", "\\infty"]
    elif names not in ([False, True, False], [True, True, True]):
        return None
    low, first, name, last, high = sides
    kind = ("[" if "e" in first else "(") + ("]" if "e" in last else ")")
    return name, Items(kind, (read(low), read(high)), f"{kind[0]}{low},{high}{kind[1]}")


def _vector(text: str, depth: int) -> Node | None:
    """Parse `3\\hat{i}+4\\hat{j}` as (3, 4)."""
    if "\\hat{" not in text:
        return None
    terms = split(re.sub(r"(?<=[^(\s])\s*([+-])", r" \1", text), re.compile(r"\s(?=[+-])"))
    found: dict[str, Node] = {}
    for term in terms:
        axis = FORM.unit_vector.findall(term)
        if len(axis) != 1 or axis[0] in found:
            return None
        factor = trim(FORM.unit_vector.sub("", term).replace(" ", "")).lstrip("+") or "1"
        found[axis[0]] = read("-1" if factor == "-" else factor, depth + 1)
    size = "ijk".index(max(found)) + 1
    zero = Value("0", number("0"))
    return Items("()", tuple(found.get(axis, zero) for axis in "ijk"[: max(size, 2)]))


def _single(text: str) -> Node:
    """Parse a single value with its unit or noun, or words."""
    bare = plain_text(text)
    if words.is_phrase(bare):
        phrase = words.canonical(bare)
        return Relation(phrase) if phrase.startswith(("\\", "-\\")) else Phrase(phrase)
    if (value := quantity(text)) is not None:
        return value
    if FORM.no_mathematics.search(text) or text.count("|") % 2:
        return Unclear(text, "no mathematics")
    if "\\text" in text or words.in_mathematics(bare):
        return Unclear(words.canonical(bare), "words beside the mathematics")
    return Value(text, number(text))
