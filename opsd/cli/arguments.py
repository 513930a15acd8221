"""The commands' arguments, from options.toml, and checks of numbers."""

import argparse
from operator import ge, gt, le, lt
from pathlib import Path

from opsd.common.errors import UserError
from opsd.common.files import read_toml

TYPES = {"int": int, "float": float, "Path": Path}
BOUNDS = {"at_least": ge, "above": gt, "at_most": le, "below": lt}


def add_options(parser: argparse.ArgumentParser, command: str, **words: str) -> None:
    """Adds a command's arguments, as options.toml lists them. words: what its {names} stand for."""
    parser.set_defaults(bounds=(bounds := {}))
    for name, given in read_toml(__file__, "options").get(command, {}).items():
        for key in given.keys() & {"help", "metavar"}:
            for word, text in words.items():
                given[key] = given[key].replace(f"{{{word}}}", text)
        if "type" in given:
            given["type"] = TYPES[given["type"]]
        bounds[name] = {key: given.pop(key) for key in BOUNDS if key in given}
        parser.add_argument(name, **given)


def check_bounds(parsed: argparse.Namespace) -> None:
    """Raises UserError for a number that is given and is out of its bounds in options.toml."""
    for option, bounds in parsed.bounds.items():
        value = getattr(parsed, option.lstrip("-").replace("-", "_")) if bounds else None
        if value is not None and not all(BOUNDS[key](value, bounds[key]) for key in bounds):
            said = " and ".join(f"{key.replace('_', ' ')} {bounds[key]}" for key in bounds)
            raise UserError(f"{option} is {value}: it must be {said}")
