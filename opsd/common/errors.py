"""Errors that a user can mend. The command line prints them as one line, without a traceback."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

LONGEST = 300  # characters that are quoted of another library's error
SHOWN = 80  # characters of a value


class UserError(ValueError):
    """What the user can put right: the message names the field, the value, what is allowed."""


def in_short(error: BaseException) -> str:
    """What another library's error is and says, on one line of some length."""
    said = " ".join(str(error).split())
    said = said if len(said) <= LONGEST else f"{said[: LONGEST - 1]}…"
    return f"{type(error).__name__}: {said}".rstrip(": ")


def first_problem(error: "ValidationError") -> str:
    """Where pydantic's first error lies, what stands there, and what is wrong with it."""
    problem = error.errors(include_url=False)[0]
    where, message = ".".join(map(str, problem["loc"])), problem["msg"]
    message = message[0].lower() + message[1:]
    shown = repr(problem["input"])
    shown = shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 1]}…"
    return f"{where} is {shown}: {message}" if where else message


def said_elsewhere(error: BaseException) -> bool:
    """Whether another process, the first, has the same error to report."""
    return getattr(error, "shared", False) and os.environ.get("RANK", "0") != "0"
