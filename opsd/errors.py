"""Errors that a user can mend. The command line prints them as one line, without a traceback."""


class UserError(ValueError):
    """Something the user can put right: the message names the field, the value and what is allowed."""
