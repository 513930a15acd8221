"""Errors that a user can mend. The command line prints them as one line, without a traceback."""


class UserError(ValueError):
    """What the user can put right: the message names the field, the value, what is allowed."""
