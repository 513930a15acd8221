"""The commands' arguments, from options.toml, and checks of numbers."""

import argparse
from pathlib import Path

from opsd.common.errors import UserError
from opsd.common.files import read_toml

TYPES = {"int": int, "float": float, "Path": Path}


def add_options(parser: argparse.ArgumentParser, command: str, **words: str) -> None:
    """Adds a command's arguments, as options.toml lists them. words: what its {names} stand for."""
    for name, given in read_toml(__file__, "options").get(command, {}).items():
        for key in given.keys() & {"help", "metavar"}:
            for word, text in words.items():
                given[key] = given[key].replace(f"{{{word}}}", text)
        if "type" in given:
            given["type"] = TYPES[given["type"]]
        parser.add_argument(name, **given)


def check_at_least(least: int, parsed: argparse.Namespace, *names: str) -> None:
    """Raises UserError if one of these arguments is given and is below `least`."""
    for name in names:
        value = getattr(parsed, name)
        if value is not None and value < least:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {value}: it must be at least {least}")
