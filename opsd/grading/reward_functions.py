"""Use reward functions that users write, of either of two kinds.

A function of TRL's kind is called once for all completions, with the keywords `prompts`,
`completions` and each column of the rows, as lists; it returns a number for each, or None for a row
that it does not judge. One of our kind is called with a completion and its row, and returns a
number, or a number and a feedback. Either may be async. Scores of several functions are added.
"""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import isfinite
from textwrap import shorten
from typing import Any

from opsd.common.errors import UserError, in_short
from opsd.data.rows import Row

Verifier = Callable[[Sequence[str], Sequence[Row]], list[tuple[float, str]]]
"""(completions, rows) → (score, feedback) of each completion; feedback is "" if there is none."""

THEIRS = {"prompts", "completions", "completion_ids"}
"""A function with one of these parameters, or with `**kwargs`, is of TRL's kind."""

ABSENT = {"completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
"""What TRL passes too, and we do not."""

VERLS = {"solution_str", "ground_truth", "solution_strs", "ground_truths"}
"""Parameters of verl's functions, which would take a row for the answer."""


def verifier_of(functions: Sequence[Callable[..., Any]]) -> tuple[Verifier, str]:
    """Combine functions into a verifier; returns it with its name. Raises UserError for what is no
    function, and later if one raises or returns something invalid."""
    verifiers = [of_either_kind(f"reward_funcs: {_name(each)}", each) for each in functions]

    def verify(completions: Sequence[str], rows: Sequence[Row]) -> list[tuple[float, str]]:
        each = [verifier(completions, rows) for verifier in verifiers]
        return [
            (sum(score for score, _ in scores), "\n".join(said for _, said in scores if said))
            for scores in zip(*each, strict=True)
        ]

    return verify, f"reward_funcs: {', '.join(map(_name, functions))}"


def _name(function: Callable[..., Any]) -> str:
    function = function.func if isinstance(function, partial) else function
    name = type(function).__name__ if callable(function) else repr(function)
    return str(getattr(function, "__name__", name))


def of_either_kind(name: str, function: Callable[..., Any]) -> Verifier:
    """Make a verifier from a function of either kind. name: the function's, for messages.

    Raises UserError if it is no function, or has parameters that it would not be given.
    """
    if not callable(function) or hasattr(function, "forward"):
        raise UserError(
            f"{name}: it must be a function; a file's goes by loss.reward.verifier, and a model "
            "that judges may be called by a function of yours"
        )
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none
        return by_row(name, function)
    parameters = signature.parameters
    keywords = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if (theirs := VERLS & parameters.keys()) and not THEIRS & parameters.keys():
        raise UserError(
            f"{name} has the parameter {min(theirs)!r}, as verl's functions have: write a "
            "function(completion, row) that calls it with row['answer']"
        )
    if not (keywords or THEIRS & parameters.keys()):
        check_two(name, function, "a completion and its row, or as TRL's functions with columns")
        return by_row(name, function)
    if absent := [
        n for n in ABSENT & parameters.keys() if parameters[n].default is inspect.Parameter.empty
    ]:
        raise UserError(f"{name} needs {min(absent)!r}, which no reward function is passed here")
    return partial(_by_lists, name, function, None if keywords else set(parameters))


def check_two(name: str, function: Callable[..., Any], given: str) -> None:
    """Raises UserError for a function that two arguments cannot call; given: what they are."""
    try:
        inspect.signature(function).bind("", {})
    except TypeError:
        taken = ", ".join(inspect.signature(function).parameters)
        raise UserError(f"{name} has the parameters ({taken}): it is called with {given}") from None
    except ValueError:
        pass  # some functions written in C have no signature


def by_row(name: str, function: Callable[[str, dict[str, Any]], Any]) -> Verifier:
    """Make a verifier from a function(completion, row). name: the function's, for messages.

    row: a dictionary of the row's columns with problem, solution and answer. The verifier raises
    UserError if the function raises or returns something invalid.
    """

    def verify(completions: Sequence[str], rows: Sequence[Row]) -> list[tuple[float, str]]:
        places = [
            f"{name}, on the problem {shorten(row.problem, 60, placeholder='…')!r}," for row in rows
        ]
        results = [
            _called(where, function, completion, {**row.columns, **row.texts})
            for where, completion, row in zip(places, completions, rows, strict=True)
        ]
        return [_score(*each) for each in zip(places, _awaited(places, results), strict=True)]

    return verify


def _score(where: str, result: Any) -> tuple[float, str]:
    score, feedback = result if isinstance(result, tuple) and len(result) == 2 else (result, "")
    number = _number(score)
    if number is None or not isfinite(number):
        wanted = "it must return a finite number, or such a number and a text"
        raise UserError(f"{where} returned {result!r}: {wanted}")
    if not isinstance(feedback, str):
        raise UserError(f"{where} returned {result!r}: its feedback must be a text")
    return number, feedback


def _by_lists(
    name: str,
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
    passed = {k: v for k, v in given.items() if wanted is None or k in wanted}
    (result,) = _awaited([name], [_called(name, function, **passed)])
    try:
        scores = [0.0 if score is None else _number(score) for score in result]
    except TypeError:  # no list
        scores = []
    if len(scores) != len(rows) or not all(s is not None and isfinite(s) for s in scores):
        all_of_them = f"a finite number for each of {len(rows)} completions, or None"
        raise UserError(f"{name} returned {result!r:.200}: it must return {all_of_them}")
    return [(score, "") for score in scores]


def _called(where: str, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
    try:
        return function(*given, **named)
    except Exception as error:  # the user's function can raise anything
        raise _raised(where, error) from error


def _raised(where: str, error: Exception) -> UserError:
    taken_for_messages = str(error).startswith("string indices")
    hint = "; completions are texts, and messages only for rows whose prompt is a chat"
    return UserError(f"{where} raised {in_short(error)}{hint * taken_for_messages}")


def _awaited(places: Sequence[str], results: Sequence[Any]) -> list[Any]:
    """The results, with those of async functions awaited, all of them together."""
    if not any(map(inspect.isawaitable, results)):
        return list(results)

    async def one(where: str, result: Any) -> Any:
        try:
            return await result if inspect.isawaitable(result) else result
        except Exception as error:
            raise _raised(where, error) from error

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*map(one, places, results))

    with ThreadPoolExecutor(1) as thread:  # in a notebook, this thread has a loop that runs
        return thread.submit(asyncio.run, all_of_them()).result()


def _number(value: Any) -> float | None:
    """A number as a float, also numpy's and torch's; None if it is none."""
    if isinstance(value, str | bytes):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
