"""Errors that a user can mend. The command line prints them as one line, without a traceback."""

import os
import re
from typing import Any

LONGEST = 300  # characters that are quoted of another library's error, or of a value


class UserError(ValueError):
    """What the user can put right: the message names the field, the value, what is allowed."""


def in_short(error: BaseException) -> str:
    """Another library's error, its type and its message, on one line that is not too long."""
    said = " ".join(str(error).split())
    said = said if len(said) <= LONGEST else f"{said[: LONGEST - 1]}…"
    return f"{type(error).__name__}: {said}".rstrip(": ")


def problem_said(problem: Any) -> str:
    """One of pydantic's errors: where it lies, what stands there, and what is wrong with it."""
    where = ".".join(map(str, problem["loc"]))
    message = re.sub(r" or instance of \w+", "", problem["msg"].removeprefix("Value error, "))
    if not where:
        return message
    shown = re.sub(r"(//)[^/\s'\"]+@", r"\1…@", repr(problem["input"]))  # a password in an address
    shown = shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"
    return f"{where} is {shown}: {message[0].lower()}{message[1:]}"


def said_elsewhere(error: BaseException) -> bool:
    """Whether another process, the first, has the same error to report."""
    return getattr(error, "shared", False) and os.environ.get("RANK", "0") != "0"
