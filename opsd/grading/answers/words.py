"""Interpret words: synonyms, numbers and dates in words, and words that take an answer back."""

import re
import unicodedata
from fractions import Fraction

from opsd.grading.answers.notation import FORM, NOTATION

_WORDS = NOTATION["words"]
_MORE_THAN_A_NAME = frozenset(_WORDS["more_than_a_name"].split())
_TAKES_BACK = frozenset(_WORDS["takes_back"].split())
_FUNCTIONS = frozenset(_WORDS["functions"].split())

_SAME = {word: to for to, words in NOTATION["same_words"].items() for word in words.split("|")}


def canonical(phrase: str) -> str:
    """A phrase in canonical form: `No real solutions` → `\\emptyset`, `DNE` → `does not exist`."""
    phrase = " ".join(phrase.replace("-", " ").split()).strip(" .!")
    if phrase[1::2].isspace() and len(phrase) % 2:  # `m g h`, a product of letters
        phrase = phrase.replace(" ", "")
    if re.fullmatch("[A-Za-z]*[a-z][A-Z]", phrase):  # `mgH`, no word
        return phrase
    if found := FORM.verdict.fullmatch(phrase):  # an explanation follows; after `no` maybe a `not`
        verdict = found[1].casefold()
        why = found[2].replace("not", "") if verdict in ("no", "false") else found[2]
        return phrase.casefold() if takes_back(why) else verdict
    if len(phrase) < 80:
        for form, meaning in NOTATION["named"].items():
            if getattr(FORM, form).fullmatch(phrase):
                return meaning
    phrase = FORM.it_is.sub("", FORM.articles.sub("", phrase.casefold()))
    if shape := FORM.shape.fullmatch(phrase):  # the order of adjectives means nothing
        phrase = " ".join([*sorted(shape[1].split()), shape[2]])
    phrase = FORM.kind_of.sub("", phrase)
    phrase = _SAME.get(phrase, phrase)
    return winner[1] if (winner := FORM.wins.fullmatch(phrase)) else phrase


_MONTHS = _WORDS["months"].split()
_MONTH = f"({'|'.join(f'{name[:3]}(?:{name[3:]}|t?[.]?)' for name in _MONTHS)})"
_DAY = r"(\d{1,2})(?:st|nd|rd|th)?"
_DATE = re.compile(rf"(?:{_MONTH} {_DAY}|{_DAY} (?:of )?{_MONTH})(?:,? (\d{{4}}))?")
_PAIRS = [pair.split() for pair in _WORDS["opposites"].split("|")]
_OPPOSITES = dict(_PAIRS) | {other: one for one, other in _PAIRS}
_NUMERALS = {name: Fraction(size) for name, size in NOTATION["numerals"].items()}


def date(text: str) -> str:
    """Month, day and year of `March 14th, 2020`, `14 Mar. 2020` or `2020-03-14`; else ""."""
    if found := FORM.iso_date.fullmatch(text):
        return f"{_MONTHS[int(found[2]) - 1][:3]} {int(found[3])} {found[1]}"
    found = _DATE.fullmatch(text.casefold())
    return f"{(found[1] or found[4])[:3]} {int(found[2] or found[3])} {found[5]}" if found else ""


def opposite(one: str, other: str) -> bool:
    """Whether two nouns are opposites, `increase` and `decrease`, or rates of different things."""
    rates = {FORM.rate.findall(side)[-1] for side in (one, other) if FORM.rate.search(side)}
    return len(rates) > 1 or any(_OPPOSITES.get(word) in other.split() for word in one.split())


def spelled_out(text: str) -> Fraction | None:
    """Parse a number in words: `twenty-five`, `one hundred and five`, `two and a half`."""
    words = text.casefold().replace("-", " ").split()
    if words[:1] in (["negative"], ["minus"]) and len(words) > 1:
        below = spelled_out(" ".join(words[1:]))
        return None if below is None else -below
    if not text.isascii():
        return _in_chinese(text)
    value = term = last = Fraction(0)
    for word in words:
        size = _NUMERALS.get(word, _NUMERALS.get(word.removesuffix("s")))
        if word == "and" and last:
            if last < 100:
                value, term, last = value + term, Fraction(0), Fraction(0)
        elif size is None or (size < 1 and (last or 1) > 19) or (size == 0 and len(words) > 1):
            return None
        elif size < 1 or size >= 100 or word == "dozen":
            term = (term or 1) * size
            if size >= 1000:
                value, term = value + term, Fraction(0)
            last = size
        elif not last or last >= 100 or (last > 19 and size < 10):
            term, last = term + size, size
        else:
            return None
    several = value and value < 100 and not 0 < term < 1  # `one and two`
    return None if several or words[-1:] in ([], ["a"], ["and"]) else value + term


def _in_chinese(text: str) -> Fraction | None:
    """Parse a Chinese number: `三百零五`, `两万`, `负三`, `二分之一`."""
    if text[0] in "负負":
        return None if (positive := _in_chinese(text[1:] or "x")) is None else -positive
    below, divided, above = text.partition("分之")
    if divided:
        one, other = _in_chinese(above or "x"), _in_chinese(below or "x")
        return one / other if one is not None and other else None
    total = section = digit = 0
    smallest = 10_000
    for character in text.replace("两", "二").replace("\N{IDEOGRAPHIC NUMBER ZERO}", "零"):
        if character not in _CHINESE_DIGITS:
            return None
        size = int(unicodedata.numeric(character))
        if (size < 10 and digit) or 10 <= smallest <= size < 10_000:
            return None  # several digits in a row, as in a year, or several tens
        if size < 10:
            digit = size
        elif size < 10_000:
            section, digit, smallest = section + (digit or 1) * size, 0, size
        else:  # 亿 multiplies all that precedes it
            total = total * (1 if size == 10_000 else size) + (section + digit) * size
            section, digit, smallest = 0, 0, 10_000
    return Fraction(total + section + digit)


_CHINESE_DIGITS = frozenset("零一二三四五六七八九十百千万萬亿億")


def is_verdict(text: str) -> bool:
    """Whether a text is a verdict with an explanation: `Yes, it is possible`."""
    return bool(FORM.verdict.fullmatch(text))


def is_phrase(text: str) -> bool:
    """Whether a text is only words. Two letters may be a product; three are taken as a word."""
    letters = sum(character.isalpha() for character in text)
    if not FORM.phrase.fullmatch(text) or text in _FUNCTIONS:
        return False
    return letters > 2 or text.casefold() in ("no", "he", "up", "on") or not text.isascii()


def in_mathematics(text: str) -> bool:
    """Whether a text has both mathematics and words: `7 is wrong`, `7 (or so)`."""
    for found in FORM.word.finditer(FORM.words_environment.sub(" ", text)):
        word = found[0]
        if word.lower() in _FUNCTIONS:
            continue
        if len(word) > 3 or (word.lower() in _MORE_THAN_A_NAME and len(word) > 1):
            return True
    return False


def names_a_thing(text: str) -> bool:
    """Whether words after a number only name what it counts: `apples and pears`, `ways`, `个`."""
    text = re.sub(
        r"\(\s*(?:approx\w*|rounded|exact(?:ly)?|to the nearest|to \w+ decimal)[^()]*\)", "", text
    ).strip(" .()")
    if len(text) > 60 or re.search(r"[\d=<>+*?!:;^\\]", text):
        return False
    if set(text) & set(_WORDS["changes_in_chinese"]):
        return False
    words = re.findall(r"[^\W\d_]+(?:['.][^\W\d_]+)?", text.lower())
    if words[-1:] == ["and"]:
        return False
    return len(words) <= 6 and not any(word in _MORE_THAN_A_NAME for word in words)


def takes_back(text: str) -> bool:
    """Whether the words next to an answer take it back: `D is wrong`, `C (or D)`."""
    return any(word in _TAKES_BACK for word in re.findall(r"[a-z']+", text.lower()))


# Word → its factor; None: it is no factor here.
MULTIPLES: dict[str, int | None] = {**NOTATION["multiples"], "percent": None}


def without_lead_in(text: str) -> str:
    """Remove a lead-in: `The answer is 12` -> `12`; a text of nothing else stays."""
    found = FORM.lead_in.match(text)
    if found is None or found.end() == len(text):
        return text
    rest = text[found.end() :]
    return rest if re.match(r"[-+\d\\$(.\[{|A-Za-z]", rest) else text
