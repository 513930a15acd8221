r"""The names in answers. A function's argument may have any: `f(t) = t^2` is the same answer as
`f(x) = x^2`. So may a constant of integration."""

import re

from opsd.grading.answers.clean import plain_text
from opsd.grading.answers.nodes import Equal
from opsd.grading.answers.notation import FORM, NOTATION

_ALONE = r"(?<![A-Za-z\\]){}(?![A-Za-z])"
_FUNCTIONS = frozenset(NOTATION["words"]["functions"].split())
# Words of a name that say nothing of which quantity it is.
_GENERIC = set("the a of is in total number answer value result required final our".split())


def letters(text: str) -> set[str]:
    """The letters in mathematics, except e and i."""
    return set(FORM.letter.findall(FORM.no_letter.sub(" ", text))) - {"e", "i"}


def is_bare(side: str) -> bool:
    """Whether a side of an inequality is a name or its absolute value: `x`, `a_1`, `|x|`."""
    return bool(FORM.bare.fullmatch(side)) and bool(letters(side))


def points(text: str) -> str | None:
    """The name of an angle, which is read from either end, of a triangle, from any corner, or of
    other points, which stand in their order: `AB` may be a vector."""
    if (found := FORM.points.fullmatch(text)) is None:
        return None
    kind, name = found[1] or "", found[2]
    alike = {"\\angle ": min(name, name[::-1]), "\\triangle ": "".join(sorted(name))}
    return kind + alike.get(kind, name)


def with_one_index(text: str) -> str:
    """A sum's or product's index as `q`, whatever it is: `i` would be the imaginary unit."""
    found = FORM.index.findall(text)
    if len(found) != 1 or re.search(_ALONE.format("q"), text):
        return text
    return re.sub(_ALONE.format(found[0]), "q", text)


def with_names(reference: str, given: str) -> str:
    """The given definition of a function with the reference's names of its arguments; as it is
    where a name would then have two meanings."""
    wanted, own = FORM.defined.match(reference), FORM.defined.match(given)
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


def chemical(text: str) -> str | None:
    """A chemical formula without its looks, `H2O` for `\\text{H}_2\\text{O}`; None for others."""
    plain = FORM.typography.sub("", text)
    return plain if FORM.chemical.fullmatch(plain) else None


def with_sets_in_order(text: str) -> str:
    """`A \\cap B` for `B \\cap A`, also as an argument; as it is where the signs differ."""

    def ordered(found: re.Match) -> str:
        parts = FORM.sign.split(found[0].strip())
        return f" {parts[1]} ".join(sorted(parts[::2])) if len(set(parts[1::2])) == 1 else found[0]

    return FORM.of_sets.sub(ordered, text)


def with_constants(reference: str, given: str) -> str:
    """The given answer with the reference's constants of integration: `c_1` for `C_1`."""
    theirs, ours = (set(FORM.numbered.findall(side)) for side in (reference, given))
    if len(theirs) == len(ours) == 1 and theirs != ours:
        (name,) = theirs
        given = given if name in given else FORM.numbered.sub(name, given)
    if FORM.defined.match(reference) and FORM.defined.match(given):  # f(x)=kx for f(x)=cx
        theirs, ours = letters(reference) - letters(given), letters(given) - letters(reference)
        if len(theirs) == len(ours) == 1 and theirs | ours <= set("cCkK"):
            own, name = ours.pop(), theirs.pop()
            given = re.sub(rf"(\\[A-Za-z]+)|{own}", lambda f: f[1] or name, given)
    if reference.endswith("C") and FORM.last.search(reference) and FORM.last.search(given):
        name = given[-1]
        given = f"{given[:-1]}C" if name not in letters(given[:-1] + reference[:-1]) else given
    return given


def without_domain(reference: str, given: str) -> str:
    """`n>=3` for `all integers n>=3`, if the reference also begins with n and a relation."""
    found = FORM.whole.match(given)
    begins = found and re.match(rf"{found[1]}\s*(?:<|>|\\[lg]e)", reference)
    return given[found.end() :] if found and begins else given


def may_name_the_same(one: Equal, other: Equal) -> bool:
    """Whether two names may be one quantity's: a description and a symbol, `\\text{Area}` and `S`,
    or two descriptions of which one has all words of the other."""
    names = [one.name or "", other.name or ""]
    if all(name.startswith("\\angle") for name in names):
        short, long = sorted((name.removeprefix("\\angle") for name in names), key=len)
        return short in (long, long[::-1], long[1:-1])
    said = [_description(side) for side in (one, other)]
    if None in said:
        return said != [None, None] and not any(map(FORM.of_something.match, names))
    return said[0] <= said[1] or said[1] <= said[0]


def _description(side: Equal) -> set[str] | None:
    """The words in a name that describes its value, `\\text{Area}`; None for a mere symbol, `S`."""
    name = plain_text(FORM.name_end.split(side.text)[0])
    if name.strip() in ("#", "\\#", "N"):
        return set()
    words = set(re.findall(r"[^\W\d_]+", name.casefold()))
    symbol = re.search(r"[(_|]|\\(?!angle|triangle)", name) or name.upper() == name
    return None if symbol or len("".join(words)) < 3 else words - _GENERIC
