"""Verifiable rewards: decide which rollouts are right, and compute their rewards.

    reward = the verifier's score + format_weight [the format matches] + overlong

`overlong` (DAPO, arXiv 2503.14476, eq. 13) is 0 up to max_new_tokens - buffer tokens and falls
linearly to -1 at max_new_tokens.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsd.common.errors import UserError, in_short
from opsd.common.near import nearest
from opsd.config.loss import LossSection, RewardSection
from opsd.config.requirements import is_graded, votes
from opsd.data.boxed import last_boxed
from opsd.data.rows import Row
from opsd.data.thoughts import final_part
from opsd.grading.completions import completions
from opsd.grading.grader import Grader
from opsd.grading.majority import Majority, majority
from opsd.grading.reward_functions import Verifier, check_two, of_either_kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from opsd.config.config import Config
    from opsd.rollout import Rollout

VERIFIER = "loss.reward.verifier"


@dataclass(frozen=True)
class GradedRollout:
    """A rollout's text and reward. feedback: why it is wrong, or "".

    A teacher's template gets it as `rollout`, and the same problem's other rollouts as `peers`.
    """

    text: str
    finished: bool
    reward: float
    correct: bool
    feedback: str = ""
    formatted: bool = True


@dataclass(frozen=True)
class RewardFunction:
    """Grades rollouts. Raises UserError if the verifier fails."""

    section: RewardSection
    tokenizer: PreTrainedTokenizerBase
    verifier: Verifier | None  # None: only count votes
    longest: int  # rollout.max_new_tokens
    in_thought: bool = False  # the context already opens a thought
    grader: Grader | None = None  # decides which answers are equal
    agreement: float = 0.0  # prompts.majority

    def __call__(self, rollouts: Sequence[Rollout], rows: Sequence[Row]) -> list[GradedRollout]:
        """Grade rollouts, in order. rows: the row of each rollout."""
        texts, graded = self._texts(rollouts)
        scores = self.verifier(graded, rows)
        assert len(scores) == len(rollouts)
        return [
            self._graded(rollout, text, *score)
            for rollout, text, score in zip(rollouts, texts, scores, strict=True)
        ]

    def majority(self, rollouts: Sequence[Rollout], row: Row) -> Majority:
        """The majority of the answers in the last boxes of a row's rollouts."""
        answers = list(map(last_boxed, self._texts(rollouts)[1]))
        return majority(answers, self.grader, self.agreement, row.answer)

    def _texts(self, rollouts: Sequence[Rollout]) -> tuple[list[str], list[str]]:
        """The rollouts' texts, and the parts of them that are graded."""
        keep = self.section.keep_special_tokens
        texts = completions(self.tokenizer, rollouts, keep)
        return texts, texts if keep else [final_part(text, self.in_thought) for text in texts]

    def _graded(self, rollout: Rollout, text: str, score: float, feedback: str) -> GradedRollout:
        form = self.section.format
        formatted = form is None or re.fullmatch(form, text, re.DOTALL) is not None
        reward = score + overlong(len(rollout.ids), self.longest, self.section.overlong_buffer)
        if form is not None and formatted:
            reward += self.section.format_weight
        correct = score >= self.section.success_threshold
        return GradedRollout(text, rollout.finished, reward, correct, feedback, formatted)


def reward_function(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    verifier: Verifier | None,
    grader: Grader,
    in_thought: bool,
) -> RewardFunction | None:
    """Make the function that grades a run's rollouts, by `verifier` or the config's verifier, and
    counts their votes; None if the run needs neither."""
    if not (is_graded(config) or votes(config)):
        return None
    section, longest = config.loss.reward, config.rollout.max_new_tokens
    verifier = (verifier or make_verifier(section, grader)) if is_graded(config) else None
    agreement = config.prompts.majority or 0.0
    return RewardFunction(section, tokenizer, verifier, longest, in_thought, grader, agreement)


def overlong(length: int, longest: int, buffer: int | None) -> float:
    """DAPO's penalty: 0 up to longest - buffer tokens, then falling linearly to -1 at `longest`."""
    if buffer is None:
        return 0.0
    return min(0.0, (longest - buffer - length) / buffer)


def check_code(section: LossSection, verifier: bool, run: bool = True) -> None:
    """Raises UserError if a gate of the config cannot be loaded, or its verifier.

    verifier: check that too. run: load the functions, which runs their files; otherwise only parse
    the files.
    """
    ours = section.without_code().gates
    for gate in section.gates:
        if gate not in ours and (function := check_function(gate.gate, "loss.gates", run)):
            check_two(f"loss.gates {gate.gate!r}", function, "the measures and the gate's scale")
    if verifier and section.reward.verifier != "math":
        if function := check_function(section.reward.verifier, VERIFIER, run):
            of_either_kind(f"{VERIFIER} {section.reward.verifier!r}", function)


def check_function(name: str, field: str, run: bool = True) -> Callable[..., Any] | None:
    """Check one `FILE.py:FUNCTION` that a config field names; see check_code. Returns it, or if it
    may not run, one of its parameters; None if they are not known."""
    if run:
        return own_function(name, field)
    where, path, function = _place(name, field)
    try:
        nodes = ast.walk(tree := ast.parse(path.read_bytes()))
        made = {getattr(node, name, None) for node in nodes for name in ("asname", "name", "id")}
    except Exception as error:  # not Python, or nested too deeply
        raise UserError(f"{where}: {path} is not Python ({in_short(error)})") from None
    if not {function, "*"} & made:
        hint = _near_function(path, function)
        raise UserError(f"{where}: {path} has no function {function!r}{hint}")
    defs = (n for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    own = (n.args for n in defs if n.name == function and not n.decorator_list)
    return next(map(_like, own), None)


def _like(parameters: ast.arguments) -> Callable[..., Any]:
    """A function of these parameters, their defaults None, that does nothing."""
    parameters.defaults = [ast.Constant(None) for _ in parameters.defaults]
    parameters.kw_defaults = [one and ast.Constant(None) for one in parameters.kw_defaults]
    made = ast.Expression(ast.Lambda(parameters, ast.Constant(None)))
    return eval(compile(ast.fix_missing_locations(made), "verifier", "eval"))


def _near_function(path: Path, name: str) -> str:
    """`; did you mean mine.py:grade?`: a file's function of a like name, or its last one."""
    try:
        body = ast.parse(path.read_bytes()).body
    except Exception:  # no file, not Python, or nested too deeply
        return ""
    own = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    near = nearest(name, own) or (own[-1] if own else "")
    return f"; did you mean {path}:{near}?" if near else ""


def make_verifier(section: RewardSection, grader: Grader) -> Verifier:
    """The verifier that the config names. Raises UserError if its file or function cannot load."""
    if section.verifier == "math":
        return lambda completions, rows: [
            (float(grade.correct), "" if grade.correct else grade.reason)
            for grade in grader.grade(completions, [row.answer for row in rows])
        ]
    return own_verifier(section.verifier)


def own_verifier(name: str) -> Verifier:
    """Load the user's `FILE.py:FUNCTION`, of either kind (`reward_functions.py`). Raises UserError
    if it cannot be loaded, and later if it raises or returns something invalid."""
    return of_either_kind(f"{VERIFIER} {name!r}", own_function(name, VERIFIER))


def _place(name: str, field: str) -> tuple[str, Path, str]:
    """Split FILE.py:FUNCTION: (how messages begin, the file, the function). Raises UserError."""
    where = f"{field} is {name!r}"
    file, colon, function = name.rpartition(":")
    if not colon or not file.endswith(".py") or not function.isidentifier():
        module, _, last = name.replace(":", ".").rpartition(".")
        file = f"{module.removesuffix('.py').replace('.', '/')}.py"  # of mine.grade, mine:grade
        hint = f"; did you mean '{file}:{last}'?" if Path(file).is_file() else ""
        hint = _near_function(Path(name), "") if name.endswith(".py") else hint
        raise UserError(f"{where}: it may be 'math' or FILE.py:FUNCTION{hint}")
    path = Path(os.path.expanduser(file))
    if not path.is_file():
        raise UserError(f"{where}: there is no file {file!r}")
    return where, path, function


@lru_cache  # it is checked before the weights are loaded and used later: load it once
def own_function(name: str, field: str) -> Callable[..., Any]:
    """Load the `FILE.py:FUNCTION` that a config field names. Raises UserError if that fails."""
    where, path, function = _place(name, field)
    spec = importlib.util.spec_from_file_location(f"opsd_verifier_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file can raise anything
        raise UserError(f"{where}: {path} fails with {in_short(error)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        hint = _near_function(path, function)
        raise UserError(f"{where}: {path} has no function {function!r}{hint}")
    return found
