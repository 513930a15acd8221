"""`opsd schema`: the JSON schema of a config, by which editors complete and check it."""

import argparse

from opsd.cli.init import SCHEMA


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`opsd schema` has none of its own."""


def run(parsed: argparse.Namespace) -> None:
    """Prints what docs/generate.py made of the config classes."""
    print(SCHEMA.read_text(encoding="utf-8"), end="")
