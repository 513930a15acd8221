r"""The names of a function's arguments: `f(t) = t^2` is the same answer as `f(x) = x^2`."""

import re

from opsd.grading.answers.notation import NOTATION

_DEFINED = re.compile(
    r"([A-Za-z](?:_\{?\d+\}?)?)\s*(?:\(\s*([a-df-hj-z](?:\s*,\s*[a-df-hj-z])*)\s*\)|_\{?([a-df-hj-z])\}?)\s*="
)
_ALONE = r"(?<![A-Za-z\\]){}(?![A-Za-z])"
_INDEX = re.compile(r"\\(?:sum|prod)\s*_\s*\{\s*([a-z])\s*=")
_FUNCTIONS = frozenset(NOTATION["words"]["functions"].split())


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
