r"""The names in answers. A function's argument may have any: `f(t) = t^2` is the same answer as
`f(x) = x^2`. So may a constant of integration."""

import re

from opsd.grading.answers.notation import NOTATION, PATTERNS

_DEFINED = re.compile(
    r"([A-Za-z](?:_\{?\d+\}?)?)\s*(?:\(\s*([a-df-hj-z](?:\s*,\s*[a-df-hj-z])*)\s*\)|_\{?([a-df-hj-z])\}?)\s*="
)
_ALONE = r"(?<![A-Za-z\\]){}(?![A-Za-z])"
_INDEX = re.compile(r"\\(?:sum|prod)\s*_\s*\{\s*([a-z])\s*=")
_FUNCTIONS = frozenset(NOTATION["words"]["functions"].split())
_NO_LETTER, _LETTER = PATTERNS["no_letter"], PATTERNS["letter"]


def letters(text: str) -> set[str]:
    """The letters in mathematics, except e and i."""
    return set(_LETTER.findall(_NO_LETTER.sub(" ", text))) - {"e", "i"}


def is_bare(side: str) -> bool:
    """Whether a side of an inequality is a name or its absolute value: `x`, `a_1`, `|x|`."""
    return bool(PATTERNS["bare"].fullmatch(side)) and bool(letters(side))


def points(text: str) -> str | None:
    """The name of an angle, which is read from either end, of a triangle, from any corner, or of
    other points, which stand in their order: `AB` may be a vector."""
    if (found := PATTERNS["points"].fullmatch(text)) is None:
        return None
    kind, name = found[1] or "", found[2]
    alike = {"\\angle ": min(name, name[::-1]), "\\triangle ": "".join(sorted(name))}
    return kind + alike.get(kind, name)


def with_one_index(text: str) -> str:
    """A sum's or product's index as `q`, whatever it is: `i` would be the imaginary unit."""
    found = _INDEX.findall(text)
    if len(found) != 1 or re.search(_ALONE.format("q"), text):
        return text
    return re.sub(_ALONE.format(found[0]), "q", text)


def with_names(reference: str, given: str) -> str:
    """The given definition of a function with the reference's names of its arguments; as it is
    where a name would then have two meanings."""
    wanted, own = _DEFINED.match(reference), _DEFINED.match(given)
    if not (wanted and own) or wanted[1] != own[1] or (wanted[2] is None) != (own[2] is None):
        return given
    theirs, ours = (re.findall("[a-z]", each[2] or each[3]) for each in (wanted, own))
    if theirs == ours or len(theirs) != len(ours) or len(set(ours)) < len(ours):
        return given
    renamed = dict(zip(ours, theirs, strict=True))
    used: set[str] = set()

    def change(found: re.Match) -> str:
        word = found[0]
        if word[0] == "\\" or word in _FUNCTIONS or len(word) > 2:
            return word
        used.update(word)
        return "".join(renamed.get(letter, letter) for letter in word)

    made = re.sub(r"\\text\s*\{[^{}]*\}|\\[A-Za-z]+|[A-Za-z]+", change, given)
    return given if (set(theirs) - set(ours)) & used else made


_NUMBERED = re.compile(r"(?<![\w\\])([cCkK])(?=\s*_\s*\{?[1-9])")
_LAST = re.compile(r"(?<=[+-])\s*[cCkK]$")
_WHOLE = PATTERNS["whole"]


def with_constants(reference: str, given: str) -> str:
    """The given answer with the reference's constants of integration: `c_1` for `C_1`."""
    theirs, ours = (set(_NUMBERED.findall(side)) for side in (reference, given))
    if len(theirs) == len(ours) == 1 and theirs != ours:
        (name,) = theirs
        given = given if name in given else _NUMBERED.sub(name, given)
    if _DEFINED.match(reference) and _DEFINED.match(given):  # f(x)=kx for f(x)=cx
        theirs, ours = letters(reference) - letters(given), letters(given) - letters(reference)
        if len(theirs) == len(ours) == 1 and theirs | ours <= set("cCkK"):
            own, name = ours.pop(), theirs.pop()
            given = re.sub(rf"(\\[A-Za-z]+)|{own}", lambda f: f[1] or name, given)
    if reference.endswith("C") and _LAST.search(reference) and _LAST.search(given):
        name = given[-1]
        given = f"{given[:-1]}C" if name not in letters(given[:-1] + reference[:-1]) else given
    return given


def without_domain(reference: str, given: str) -> str:
    """`n>=3` for `all integers n>=3`, if the reference also begins with n and a relation."""
    found = _WHOLE.match(given)
    begins = found and re.match(rf"{found[1]}\s*(?:<|>|\\[lg]e)", reference)
    return given[found.end() :] if found and begins else given
