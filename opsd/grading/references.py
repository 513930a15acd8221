"""Check before a run whether a model could give the answers of a dataset."""

import math
import re
from collections.abc import Callable, Sequence

from opsd.common.errors import UserError
from opsd.data.context_check import given_choices
from opsd.data.rows import Row
from opsd.grading.answers.clean import clean
from opsd.grading.answers.nodes import Unclear
from opsd.grading.answers.read import read

_LOOKED_AT = 500  # check at most this many answers, which takes 0.1 s


def check_references(rows: Sequence[Row], field: str, note: Callable[[str], None]) -> None:
    """Note how many of some reference answers equal only their own text.

    field: the config field of the answers' column. Raises UserError for an answer that is only the
    number of one of its row's choices.
    """
    for number, row in enumerate(rows, start=1):
        name, choices = given_choices(row.columns)
        places = range(len(choices) + 1) if choices else ()
        if row.answer in map(str, places):
            if not any(re.search(rf"(?<!\d){row.answer}(?!\d)", one) for one in choices):
                raise UserError(
                    f"{field}: {row.answer} in row {number} is a place among its {name}, not what "
                    "a model answers: name a column with the letter or the text"
                )
    looked_at = [row.answer for row in rows[:: math.ceil(len(rows) / _LOOKED_AT)]]
    texts = [(answer, why) for answer in looked_at if (why := only_as_text(answer))]
    if texts:
        answer, why = texts[0]
        shown = answer if len(answer) < 60 else f"{answer[:60]}…"
        note(
            f"{len(texts)} of {len(looked_at)} answers looked at are read as text, which only the "
            f"same text equals, such as {shown!r} ({why})"
        )


def only_as_text(answer: str) -> str | None:
    """Why a reference equals only its own text; None if it is understood."""
    node = read(clean(answer))
    return node.why if isinstance(node, Unclear) and "dots" not in node.why else None
