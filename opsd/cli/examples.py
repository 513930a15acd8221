"""`opsd examples`: which configs `opsd init NAME` writes."""

import argparse
import re

from opsd.cli.init import EXAMPLES, examples, is_study
from opsd.common.display import Display


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`opsd examples` has none of its own."""


def run(parsed: argparse.Namespace) -> None:
    """Shows a table of names, and what each is."""
    rows = []
    for path in examples():
        text = path.read_text(encoding="utf-8")
        comment = re.match(r"(?:#.*\n)*", text)[0]
        words = re.sub(r"^# ?(opsd (compare|plan|train) .*)?", "", comment, flags=re.MULTILINE)
        said = re.split(r"(?<=[a-z0-9)]{2}[.;])\s|: ", " ".join(words.split()))[0].rstrip(".;")
        name = str(path.relative_to(EXAMPLES).with_suffix(""))
        rows.append((name, "opsd compare" if is_study(text) else "opsd train", said))
    display = Display()
    display.table("opsd init NAME writes one of", ["name", "for", "what it is"], rows)
