"""The page of an evaluation: its result, its settings, and completions to read.

It is one HTML document that loads no other files and runs no script. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opsd.data.rows import Row
from opsd.evaluate.result import Answer, remarks, table
from opsd.report.page import readable
from opsd.report.render import render

MAX_PROBLEMS = 300
MAX_SAMPLES = 8  # completions shown per problem: right, wrong and truncated ones
MAX_CHARACTERS = 12_000  # shown of a completion, leaving out its middle: it must open on a phone
OPEN_CHARACTERS = 1_200  # longer completions, and truncated ones, are folded

ASKED = (
    "model model_digest benchmark source revision benchmark_digest samples temperature top_p top_k "
    "max_new_tokens thinking seed precision"
).split()


def page(result: dict[str, Any], rows: Sequence[Row], answers: Sequence[Sequence[Answer]]) -> str:
    """Render the page. answers: the answers to each row."""
    known = {name: result[name] for name in ASKED if result.get(name) is not None}
    return render(
        "evaluation.html",
        result=result,
        rates=table(result),
        remarks=remarks(result),
        problems=[
            {
                "row": row,
                "answers": problem,
                "right": sum(answer.grade.correct for answer in problem),
                "chosen": _chosen(problem),
            }
            for row, problem in list(zip(rows, answers, strict=True))[:MAX_PROBLEMS]
        ],
        left_out=max(0, len(rows) - MAX_PROBLEMS),
        facts=[
            ("Evaluation", readable(known)),
            ("Versions", readable(result.get("versions"))),
            ("Machine", readable(result.get("machine"))),
        ],
        shorten=shorten,
        longest=MAX_CHARACTERS,
        open_characters=OPEN_CHARACTERS,
    )


def _chosen(problem: Sequence[Answer]) -> list[Answer]:
    """Choose at most MAX_SAMPLES answers, in turn from right, wrong and truncated ones."""
    kinds: dict[tuple[bool, bool], list[Answer]] = {}
    for answer in problem:
        kinds.setdefault((answer.grade.correct, answer.completion.finished), []).append(answer)
    order = [group[i] for i in range(len(problem)) for group in kinds.values() if i < len(group)]
    return sorted(order[:MAX_SAMPLES], key=lambda answer: answer.completion.sample)


def shorten(text: str, longest: int) -> str:
    """The text; if it has more than `longest` characters, without its middle."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
