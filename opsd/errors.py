"""Errors that a user can mend. The command line prints them as one line, without a traceback."""

import os


class UserError(ValueError):
    """What the user can put right: the message names the field, the value, what is allowed."""


def said_elsewhere(error: BaseException) -> bool:
    """Whether another process, the first, has the same error to report."""
    return getattr(error, "shared", False) and os.environ.get("RANK", "0") != "0"
