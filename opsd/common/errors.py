"""Errors that a user can fix. The command line prints them as one line, without a traceback."""

import os
import re
from typing import Any

LONGEST = 300  # characters quoted of a value or of another library's error


class UserError(ValueError):
    """An error that the user can fix: the message names the field, its value, what is allowed. Of
    one that quotes very much of a file, such as a name of megabytes, the middle is left out."""

    def __str__(self) -> str:
        said = super().__str__()
        return said if len(said) <= 1900 else f"{said[:1200]} … {said[-600:]}"


def in_short(error: BaseException) -> str:
    """The type and message of another library's error, on one line, cut to LONGEST characters."""
    said = " ".join(str(error).split())
    said = said if len(said) <= LONGEST else f"{said[: LONGEST - 1]}…"
    return f"{type(error).__name__}: {said}".rstrip(": ")


def problem_said(problem: Any) -> str:
    """Words one of pydantic's errors: the field, its value, and what is wrong with it."""
    where = ".".join(map(str, problem["loc"]))
    message = re.sub(r" or instance of \w+", "", problem["msg"].removeprefix("Value error, "))
    if not where:
        return message
    shown = re.sub(r"(//)[^/\s'\"]+@", r"\1…@", repr(problem["input"]))  # a password in an address
    shown = shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"
    return f"{where} is {shown}: {message[0].lower()}{message[1:]}"


def said_elsewhere(error: BaseException) -> bool:
    """Whether the process of rank 0 has the same error and reports it."""
    return getattr(error, "shared", False) and os.environ.get("RANK", "0") != "0"
