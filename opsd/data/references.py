r"""Extract the bare final answer from a dataset's answer column, or say why there is none.

A misread reference would reward wrong answers in every step of a run. So an unclear reference is
refused before the run begins, by row and column.
"""

import ast
import re

from opsd.common.files import read_toml
from opsd.common.forms import forms
from opsd.data.boxed import boxes, is_placeholder, joined

MOST_CHARACTERS = 4000

FORM = forms(read_toml(__file__, "answers")["references"])


class Unreadable(ValueError):
    """The reference has no clear final answer; the message completes "the reference …"."""


def final_answer(text: str) -> str:
    """The bare final answer. Raises Unreadable if there is none, or several candidates.

    >>> final_answer("2 + 3 = 5\\n#### 5"), final_answer("['3', '5']")
    ('5', '3, 5')
    """
    if (text := text.strip()).isdecimal() and len(text) < 200:
        return text
    answer = _found(text)
    if not answer or (len(answer) < 200 and FORM.nothing.fullmatch(answer)):
        raise Unreadable("names no final answer")
    if answer[0] == "{" and FORM.dictionary.match(answer):
        raise Unreadable("is an object in a string: data.columns.answer can name its entry")
    if len(answer) < 1000 and (part := FORM.markup.search(answer)):
        raise Unreadable(f"holds {part[0]!r}, which no answer would: write it bare")
    if len(answer) > MOST_CHARACTERS:
        raise Unreadable(f"is longer than {MOST_CHARACTERS} characters")
    if problem := unreadable(answer):
        raise Unreadable(problem)
    return answer


def _found(text: str) -> str:
    if "####" in text:
        return _after_hashes(text)
    found, cut = boxes(text)
    real = [box for box in found if not is_placeholder(box.content)]
    if cut:
        raise Unreadable("is cut off inside its last box")
    if found and not real:
        raise Unreadable("has only an empty box")
    if real:
        answer, together = joined(text, real)
        others = {box.content for box in real[:-together]} - {answer}
        if others and together == 1:
            shown = ", ".join(sorted(others)[:3])
            raise Unreadable(f"has several boxes with different answers: {shown}, {answer}")
        return answer
    if "<answer>" in text and text.endswith("</answer>"):
        return text.removesuffix("</answer>").rpartition("<answer>")[2].strip()
    if (several := _list_in_a_string(text)) is not None:
        return several
    end = re.sub(r"\s+", lambda blank: "\n" if "\n" in blank[0] else " ", text[-300:])
    while stated := FORM.stated.search(end):  # cubic in the length of a blank: `end` has short ones
        text = end = stated[1].strip()
    if said := FORM.correct.fullmatch(text) or FORM.bold.fullmatch(text):
        return said[1].strip()
    return text


def _after_hashes(text: str) -> str:
    """The answer after GSM8K's mark, `#### 5`. Of several different ones, one must be a number."""
    said = [part.strip().split("\n")[0].strip() for part in text.split("####")[1:]]
    said = [part for part in said if part]
    if len(set(said)) > 1:
        numbers = [part for part in said if any(character.isdecimal() for character in part)]
        if len(set(numbers)) != 1:
            raise Unreadable(f"has several final answers after ####: {', '.join(said[:4])}")
        said = numbers
    return said[-1] if said else ""


def _list_in_a_string(text: str) -> str | None:
    """The answers in a list's str(), `['3', '5']`; None without quotes: `[3, 5]` can be a range."""
    if text[:1] not in "[(" or text[-1:] not in "])" or not ("'" in text or '"' in text):
        return None
    if len(text) > MOST_CHARACTERS:
        return None
    try:
        parts = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(parts, (list, tuple)) or not all(
        isinstance(p, (str, int, float)) for p in parts
    ):
        return None
    said = [str(part).strip().strip("$").strip() for part in parts]
    return ", ".join(part for part in said if part)


def unreadable(answer: str) -> str | None:
    """Why a text is no bare answer: it is prose, or truncated. None if it is one."""
    if _is_prose(answer) or (len(answer) < 300 and FORM.no_answer.fullmatch(answer)):
        return "is prose that names no final answer by itself"
    stripped = re.sub(r"\\[{}]", "", answer)
    opened = sum(map(stripped.count, "([")) - sum(map(stripped.count, ")]"))
    if (
        stripped.count("{") != stripped.count("}")
        or opened > 0
        or FORM.unfinished.search(answer[-20:])
    ):
        return "is cut off"
    return None


def _is_prose(text: str) -> bool:
    """Whether a text explains how to find the answer: it has sentences or lines, and numbers."""
    words = FORM.word.findall(text)
    telling = bool(FORM.telling.search(text))
    least = 2 if telling and FORM.sentences.search(text) else 4
    if len(words) < least or not re.search(r"[\d=]|five|three|two|four", text):
        return False
    outside = re.sub(r"\\begin\s*\{.*\\end\s*\{", "", text, flags=re.DOTALL)
    return bool(FORM.sentences.search(outside)) or telling
