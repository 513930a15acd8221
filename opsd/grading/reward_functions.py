"""Use reward functions that Python code passes, of either of two kinds.

A function of TRL's kind is called once for all completions, with the keywords `prompts`,
`completions` and each column of the rows, as lists; it returns a number for each, or None for a row
that it does not judge. One of our kind, as in loss.reward.verifier, is called with a completion and
its row, and returns a number, or a number and a feedback. Scores of several functions are added.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from math import isfinite
from typing import Any

from opsd.common.errors import UserError, in_short
from opsd.data.rows import Row
from opsd.grading.rewards import Verifier, by_row

THEIRS = {"prompts", "completions", "completion_ids"}
"""A function with one of these parameters, or with `**kwargs`, is of TRL's kind."""


def verifier_of(functions: Sequence[Callable[..., Any]]) -> tuple[Verifier, str]:
    """Combine functions into a verifier; returns it with its name. Raises UserError for what is no
    function, and later if one raises or returns something invalid."""
    verifiers = [_verifier(function) for function in functions]

    def verify(completions: Sequence[str], rows: Sequence[Row]) -> list[tuple[float, str]]:
        each = [verifier(completions, rows) for verifier in verifiers]
        return [
            (sum(score for score, _ in scores), "\n".join(said for _, said in scores if said))
            for scores in zip(*each, strict=True)
        ]

    return verify, f"reward_funcs: {', '.join(map(_name, functions))}"


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _verifier(function: Callable[..., Any]) -> Verifier:
    if not callable(function):
        raise UserError(
            f"reward_funcs has {function!r}: it must be a function; a file's goes by "
            "loss.reward.verifier, and a model that judges may be called by a function of yours"
        )
    parameters = inspect.signature(function).parameters
    keywords = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if keywords or THEIRS & parameters.keys():
        return partial(_by_lists, function, None if keywords else set(parameters))
    return by_row(f"reward_funcs: {_name(function)}", function)


def _by_lists(
    function: Callable[..., Any],
    wanted: set[str] | None,
    completions: Sequence[str],
    rows: Sequence[Row],
) -> list[tuple[float, str]]:
    """Call a function of TRL's kind. wanted: its keywords; None: pass all that there are."""
    columns = [{**row.columns, **row.texts} for row in rows]
    names = {name: None for row in columns for name in row}
    given: dict[str, list[Any]] = {name: [row.get(name) for row in columns] for name in names}
    # If a row is a chat, TRL passes prompt and completion as messages.
    chats = [isinstance(row.get("prompt"), list) for row in columns]
    given["prompts"] = [
        row["prompt" if chat else "problem"] for row, chat in zip(columns, chats, strict=True)
    ]
    given["completions"] = [
        [{"role": "assistant", "content": text}] if chat else text
        for text, chat in zip(completions, chats, strict=True)
    ]
    try:
        scores = function(**{k: v for k, v in given.items() if wanted is None or k in wanted})
        scores = [0.0 if score is None else float(score) for score in scores]
    except Exception as error:  # the user's function can raise anything
        raise UserError(f"reward_funcs: {_name(function)} raised {in_short(error)}") from error
    if len(scores) != len(rows) or not all(map(isfinite, scores)):
        raise UserError(
            f"reward_funcs: {_name(function)} returned {scores!r:.200}: it must return a finite "
            f"number for each of {len(rows)} completions, or None"
        )
    return [(score, "") for score in scores]
