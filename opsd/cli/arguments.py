"""Checks of numeric arguments, shared by several commands."""

import argparse

from opsd.common.errors import UserError


def check_at_least(least: int, parsed: argparse.Namespace, *names: str) -> None:
    """Raises UserError if one of these arguments is given and is below `least`."""
    for name in names:
        value = getattr(parsed, name)
        if value is not None and value < least:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {value}: it must be at least {least}")
