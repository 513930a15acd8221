"""Which rollouts are right, and what each is worth: verifiable rewards.

    reward = the verifier's score + format_weight [the format matches] + overlong

`overlong` (DAPO, arXiv 2503.14476, eq. 13) is 0 up to max_new_tokens - buffer tokens and falls
linearly to -1 at max_new_tokens.
"""

import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from opsd.common.errors import UserError
from opsd.config.loss import RewardSection
from opsd.data.rows import Row
from opsd.grading.grader import Grades
from opsd.rollout import Rollout
from opsd.rollout.base import decode


@dataclass(frozen=True)
class Outcome:
    """What became of a rollout. `feedback`: why it is wrong, for the teacher; "" if there is none.

    A template sees it as `rollout`, and those of the same problem's other rollouts as `peers`.
    """

    text: str
    finished: bool
    reward: float
    correct: bool
    feedback: str = ""
    formatted: bool = True


@dataclass(frozen=True)
class Verdict:
    """A verifier's score of one completion, and what it has to say of it."""

    score: float
    feedback: str = ""


class Verifier(Protocol):
    """Grades completions against their rows, in order."""

    def __call__(self, completions: Sequence[str], rows: Sequence[Row]) -> list[Verdict]: ...


class Judge:
    """Rollouts → outcomes. Raises UserError where the verifier fails."""

    def __init__(
        self,
        section: RewardSection,
        tokenizer: PreTrainedTokenizerBase,
        verifier: Verifier,
        longest: int,
    ):
        self.section, self.tokenizer, self.verifier = section, tokenizer, verifier
        self.longest = longest  # rollout.max_new_tokens
        self.format = None if section.format is None else re.compile(section.format, re.DOTALL)

    def __call__(self, rollouts: Sequence[Rollout], rows: Sequence[Row]) -> list[Outcome]:
        """One outcome a rollout; `rows` are those of the rollouts, one for each."""
        texts = decode(self.tokenizer, rollouts)
        verdicts = self.verifier(texts, rows)
        assert len(verdicts) == len(rollouts)
        return [
            self._outcome(rollout, text, verdict)
            for rollout, text, verdict in zip(rollouts, texts, verdicts, strict=True)
        ]

    def _outcome(self, rollout: Rollout, text: str, verdict: Verdict) -> Outcome:
        formatted = self.format is None or self.format.fullmatch(text) is not None
        reward = verdict.score + overlong(
            len(rollout.ids), self.longest, self.section.overlong_buffer
        )
        if self.format is not None and formatted:
            reward += self.section.format_weight
        correct = verdict.score >= self.section.success_threshold
        return Outcome(text, rollout.finished, reward, correct, verdict.feedback, formatted)


def overlong(length: int, longest: int, buffer: int | None) -> float:
    """0 for a rollout of up to longest - buffer tokens, then linearly down to -1."""
    if buffer is None:
        return 0.0
    return min(0.0, (longest - buffer - length) / buffer)


def check_verifier(section: RewardSection) -> None:
    """Raises UserError where the verifier that the config names cannot be loaded."""
    if section.verifier != "math":
        own_verifier(section.verifier)


def make_verifier(
    section: RewardSection, grader: Grades, score: Callable[[str, str], float] | None = None
) -> Verifier:
    """The verifier that the config names.

    `score`: (completion, answer) → its score, instead of it. Raises UserError where a file or its
    function cannot be loaded.
    """
    if score is not None:
        return lambda completions, rows: [
            Verdict(score(completion, row.answer))
            for completion, row in zip(completions, rows, strict=True)
        ]
    if section.verifier == "math":
        return lambda completions, rows: [
            Verdict(float(grade.correct), "" if grade.correct else grade.reason)
            for grade in grader.grade(completions, [row.answer for row in rows])
        ]
    return own_verifier(section.verifier)


def own_verifier(name: str) -> Verifier:
    """The user's `FILE.py:FUNCTION`: function(completion, row) → score, or (score, feedback).

    `row` is a dictionary of the row's columns with problem, solution and answer. Raises UserError
    where it cannot be loaded, and where it raises or returns something else.
    """
    function = _load(name)

    def verify(completions: Sequence[str], rows: Sequence[Row]) -> list[Verdict]:
        return [
            _verdict(name, function, completion, row)
            for completion, row in zip(completions, rows, strict=True)
        ]

    return verify


@lru_cache  # checked before the weights are loaded, used after
def _load(name: str) -> Callable[[str, dict[str, Any]], Any]:
    where = f"loss.reward.verifier is {name!r}"
    file, colon, function = name.rpartition(":")
    if not colon or not file.endswith(".py") or not function.isidentifier():
        raise UserError(f"{where}: it may be 'math' or FILE.py:FUNCTION")
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"{where}: there is no file {file!r}")
    spec = importlib.util.spec_from_file_location(f"opsd_verifier_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file does
        raise UserError(f"{where}: {file} fails with {_said(error)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"{where}: {file} has no function {function!r}")
    return found


def _verdict(name: str, function: Callable, completion: str, row: Row) -> Verdict:
    where = f"loss.reward.verifier {name!r}, on the problem {_short(row.problem)}"
    columns = {
        **row.columns,
        "problem": row.problem,
        "solution": row.solution,
        "answer": row.answer,
    }
    try:
        result = function(completion, columns)
    except Exception as error:  # whatever the user's function does
        raise UserError(f"{where}, raised {_said(error)}") from error
    score, feedback = result if isinstance(result, tuple) and len(result) == 2 else (result, "")
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise UserError(
            f"{where}, returned {result!r}: it must return a finite number, or such a number and "
            "a text"
        )
    if not isinstance(feedback, str):
        raise UserError(f"{where}, returned {result!r}: its feedback must be a text")
    return Verdict(float(score), feedback)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _short(problem: str) -> str:
    line = " ".join(problem.split())
    return repr(line if len(line) <= 60 else line[:57] + "…")
