"""The page of an evaluation: the result, what was asked, and the completions to read.

One HTML document that loads nothing and runs no script. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opsd.data.rows import Row
from opsd.evaluate.result import Answer, remarks, table
from opsd.report.page import readable
from opsd.report.render import render

MAX_PROBLEMS = 300
MAX_SAMPLES = 8  # shown of one problem, among them right, wrong and cut-off ones
MAX_CHARACTERS = 12_000  # shown of one completion, without its middle: a page must open on a phone
OPEN_CHARACTERS = 1_200  # longer completions, and cut-off ones, are folded

ASKED = (
    "model model_digest benchmark source revision benchmark_digest samples temperature top_p top_k "
    "max_new_tokens thinking seed precision"
).split()


def page(result: dict[str, Any], rows: Sequence[Row], answers: Sequence[Sequence[Answer]]) -> str:
    """The whole page; `answers` holds each row's answers."""
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
    """At most MAX_SAMPLES, of each kind some: round robin over right, wrong and cut off."""
    kinds: dict[tuple[bool, bool], list[Answer]] = {}
    for answer in problem:
        kinds.setdefault((answer.grade.correct, answer.completion.finished), []).append(answer)
    order = [group[i] for i in range(len(problem)) for group in kinds.values() if i < len(group)]
    return sorted(order[:MAX_SAMPLES], key=lambda answer: answer.completion.sample)


def shorten(text: str, longest: int) -> str:
    """The text, its middle left out where it is longer."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
