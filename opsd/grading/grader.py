"""Grade completions: is the answer in the last `\\boxed{…}` right?

Equal strings, plain numbers and words are compared here; everything else in a worker process
(`answers`). math-verify's own time limit needs the main thread, fails silently elsewhere and cannot
interrupt a long computation (`9^{9^{9^9}}`). So here the limit is a kill: a hostile answer costs a
worker and scores 0 with a reason (`opsd.common.workers`). Imports no torch; workers start when
first needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from opsd.common.errors import UserError
from opsd.common.workers import Ended, Workers
from opsd.data.boxed import last_boxed
from opsd.data.references import unreadable
from opsd.grading.answers.bounds import MOST_CHARACTERS as MAX_ANSWER_CHARACTERS
from opsd.grading.answers.bounds import too_large
from opsd.grading.answers.clean import clean, squeezed
from opsd.grading.answers.numbers import number, same_number
from opsd.grading.answers.words import canonical, is_phrase, opposite, spelled_out


@dataclass(frozen=True)
class Grade:
    """A completion's grade. reason: why, in words. extracted: the last box's content, None without
    one. failed: there was no verdict, because of time, memory or size; it counts as wrong."""

    correct: bool
    reason: str
    extracted: str | None
    failed: bool = False


def _grade_here(extracted: str, answer: str) -> Grade | None:
    """Decide the cheap cases; None if math-verify has to decide."""
    if extracted == answer.strip():
        return Grade(True, "the same text", extracted)
    for text, whose in ((extracted, "answer"), (answer, "reference")):
        if len(text) > MAX_ANSWER_CHARACTERS:
            reason = f"the {whose} is longer than {MAX_ANSWER_CHARACTERS} characters"
            return Grade(False, reason, extracted, failed=True)
    given, wanted = clean(extracted), clean(answer)
    if given == "":
        return Grade(False, "the box is empty", extracted)
    if squeezed(given) == squeezed(wanted):
        return Grade(True, "the same text", extracted)
    if problem := unreadable(answer):
        return Grade(False, f"the reference {problem}", extracted, failed=True)
    numbers = number(given), number(wanted)
    if numbers[0] is not None and numbers[1] is not None:
        equal = same_number(*numbers)
        return Grade(equal, "equal numbers" if equal else "different numbers", extracted)
    if too_large(given) or too_large(wanted):
        return Grade(False, "a number too large to compare", extracted, failed=True)
    if is_phrase(given) and is_phrase(wanted) and len(given) > 1 and len(wanted) > 1:
        # math-verify reads words as products of letters, so that `listen` equals `silent`.
        equal = canonical(given) == canonical(wanted) and not opposite(given, wanted)
        several = {"and", "or"} & {*given.casefold().split(), *wanted.casefold().split()}
        spelled = spelled_out(given), spelled_out(wanted)
        if equal or not (several or "," in given + wanted or any(spelled)):
            return Grade(equal, "the same words" if equal else "different words", extracted)
    return None


class Grader:
    r"""Grades completions against reference answers; a context manager that owns its workers.

    timeout: seconds of CPU time for one answer (more time on a busy machine). workers: processes at
    most. memory_limit: bytes that each may take. strict: as `loss.reward.strict`
    (opsd.grading.answers.strict). Any thread may call it, one at a time. Workers start when first
    needed, are replaced when they die, and end with `close()`, with the object, or with this
    process. Raises UserError for invalid arguments. docs/evaluate.md says how answers are compared.

    >>> with Grader() as grader:
    ...     grades = grader.grade([r"So \boxed{1,024}.", "1024"], ["1024", "1024"])
    >>> [(grade.correct, grade.reason) for grade in grades]
    [(True, 'equal numbers'), (False, 'no \\boxed answer')]
    """

    def __init__(
        self,
        *,
        timeout: float = 5.0,
        workers: int = 1,
        memory_limit: int = 2 << 30,
        strict: bool = True,
    ):
        if not 0 < timeout < math.inf:
            raise UserError(f"timeout: {timeout!r} is not a positive, finite number of seconds")
        if workers < 1:
            raise UserError(f"workers: {workers!r} is not a positive number of processes")
        if memory_limit < 256 << 20:
            raise UserError(
                f"memory_limit: {memory_limit!r} is below 256 MiB, which a worker needs"
            )
        self.timeout, self.workers, self.memory_limit = timeout, workers, memory_limit
        self.strict = strict
        made_by = "opsd.grading.worker", *(["strict"] * strict)
        self._workers = Workers(*made_by, seconds=timeout, memory=memory_limit, most=workers)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_exception) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers. If the grader is used again, it starts new ones."""
        self._workers.close()

    def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[Grade]:
        """Returns a Grade for each completion, in order. Equal pairs are compared once.

        Raises ValueError if the lengths differ or an answer is empty, UserError if math-verify
        cannot be started.
        """
        if len(completions) != len(answers):
            raise ValueError(f"{len(completions)} completions for {len(answers)} answers")
        grades: list[Grade | None] = []
        hard: dict[tuple[str, str], list[int]] = {}  # (extracted, answer) → its indices
        for index, (completion, answer) in enumerate(zip(completions, answers, strict=True)):
            if not answer.strip():
                raise ValueError(f"answers[{index}] is empty")
            extracted = last_boxed(completion)
            if extracted is None:
                grades.append(Grade(False, "no \\boxed answer", None))
                continue
            grade = _grade_here(extracted, answer)
            if grade is None:
                hard.setdefault((extracted, answer), []).append(index)
            grades.append(grade)
        if hard:
            verdicts = self._judge(list(hard))
            for job, indices in hard.items():
                for index in indices:
                    correct, reason, failed = verdicts[job]
                    grades[index] = Grade(correct, reason, job[0], failed)
        return grades

    def _judge(self, jobs: list[tuple[str, str]]) -> dict[tuple[str, str], tuple[bool, str, bool]]:
        """Maps each job to (correct, reason, failed); the workers run in parallel."""
        replies = self._workers.answers([json.dumps(job).encode() for job in jobs])
        why = {
            "time": f"no verdict within {self.timeout:g} s",
            "memory": "comparing the answer takes too much memory",
            "killed": "the grading process died (out of memory?)",
        }
        verdicts = [
            (False, why[r.why], True) if isinstance(r, Ended) else (*json.loads(r), False)
            for r in replies
        ]
        return dict(zip(jobs, verdicts, strict=True))
