"""Compute an evaluation's result from its completions: grades, avg@k, pass@k, maj@k. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from opsd.common.statistics import Estimate, bootstrap, majority, pass_at_k
from opsd.data.rows import Row
from opsd.data.thoughts import final_part
from opsd.evaluate.answers import Completion
from opsd.grading.grader import Grade, Grader
from opsd.grading.majority import groups_of_equals


@dataclass(frozen=True)
class Answer:
    """A completion with its grade."""

    completion: Completion
    grade: Grade


def grade_all(
    rows: Sequence[Row], completions: Sequence[Completion], grader: Grader, in_thought: bool = False
) -> list[list[Answer]]:
    """Grade all completions; returns for each row the answers of its samples, in order.

    in_thought: the contexts already open a thought, so completions begin inside of it.
    """
    ordered = sorted(completions, key=lambda completion: completion.place)
    grades = grader.grade(
        [final_part(completion.text, in_thought) for completion in ordered],
        [rows[completion.problem].answer for completion in ordered],
    )
    answers: list[list[Answer]] = [[] for _ in rows]
    for completion, grade in zip(ordered, grades, strict=True):
        answers[completion.problem].append(Answer(completion, grade))
    return answers


def measure(answers: Sequence[Sequence[Answer]], grader: Grader, seed: int = 0) -> dict[str, Any]:
    """All figures of an evaluation; each rate has a bootstrap interval over problems.

    Truncated answers are graded by the text that there is, and also counted separately.
    """
    samples = len(answers[0])
    correct = [[answer.grade.correct for answer in problem] for problem in answers]
    average = bootstrap([sum(right) / samples for right in correct], seed)
    passes = {
        str(k): asdict(bootstrap([pass_at_k(samples, sum(right), k) for right in correct], seed))
        for k in powers(samples)
    }
    flat = [answer for problem in answers for answer in problem]
    finished = [answer for answer in flat if answer.completion.finished]
    cut = [answer for answer in flat if not answer.completion.finished]
    votes = [vote(problem, grader) for problem in answers]
    return {
        "problems": len(answers),
        "samples": samples,
        "accuracy": average.value,
        "low": average.low,
        "high": average.high,
        "pass_at_k": passes,
        "majority": asdict(bootstrap(votes, seed)),
        "truncated": {"answers": len(cut), "correct": sum(a.grade.correct for a in cut)},
        "finished": {"answers": len(finished), "correct": sum(a.grade.correct for a in finished)},
        "truncated_fraction": len(cut) / len(flat),
        "unanswered": sum(answer.grade.extracted is None for answer in flat),
        "ungraded": sum(answer.grade.failed for answer in flat),
        "mean_length": sum(answer.completion.tokens for answer in flat) / len(flat),
    }


def powers(samples: int) -> list[int]:
    """The powers of 2 up to `samples`, and `samples`: the k of pass@k."""
    return sorted({samples, *(1 << i for i in range(samples.bit_length()))})


def vote(problem: Sequence[Answer], grader: Grader) -> float:
    """Whether the majority of a problem's answers is right: 0 to 1, see statistics.majority.

    All right answers form one group. Wrong ones are compared with each other, by the grader if
    their texts differ, but only if the result depends on it.
    """
    right = sum(answer.grade.correct for answer in problem)
    wrong = [
        answer.grade.extracted
        for answer in problem
        if not answer.grade.correct and answer.grade.extracted is not None
    ]
    if right == 0 or right > len(wrong):
        return float(right > 0)

    def same(one: str, other: str) -> bool:
        return bool(other) and grader.grade([f"\\boxed{{{one}}}"], [other])[0].correct

    return majority([0] * right + [1 + group for group in groups_of_equals(wrong, same)], right=0)


def table(result: dict[str, Any]) -> list[list[str]]:
    """A row [name, value, 95 % interval] for each metric, as text."""
    samples = result["samples"]
    rows = [(f"avg@{samples}", Estimate(result["accuracy"], result["low"], result["high"]))]
    if samples > 1:
        rows.append((f"maj@{samples}", Estimate(**result["majority"])))
        passes = result["pass_at_k"].items()
        rows += [(f"pass@{k}", Estimate(**one)) for k, one in passes if k != "1"]  # pass@1 = avg
    return [[name, f"{one.value:.3f}", f"{one.low:.3f} to {one.high:.3f}"] for name, one in rows]


def remarks(result: dict[str, Any]) -> list[str]:
    """Lines on truncated, unanswered and ungraded answers, to be shown below the rates."""
    total = result["problems"] * result["samples"]
    cut = result["truncated"]
    lines = [
        f"{cut['answers']} of {total} answers were cut off at {result['max_new_tokens']} tokens, "
        f"{cut['correct']} of them right; mean length {result['mean_length']:.0f} tokens"
    ]
    if result["unanswered"]:
        lines.append(f"{result['unanswered']} of {total} answers have no \\boxed{{}} and score 0")
    if result["ungraded"]:
        lines.append(f"{result['ungraded']} answers score 0 because grading them failed")
    if result.get("left_out"):
        lines.append(f"{result['left_out']} problems were left out: no parser can grade them")
    return lines
