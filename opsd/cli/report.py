"""`opsd report`: writes report.html and curves.png of a run."""

import argparse
from pathlib import Path

from opsd.common.display import Display


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `opsd report`."""
    parser.add_argument("directory", metavar="RUN_DIR", type=Path)


def run(parsed: argparse.Namespace) -> None:
    """Writes both files and says where. Raises UserError."""
    from opsd.report import write_report

    display = Display()
    for name, path in write_report(parsed.directory).items():
        display.note(f"{name}: {path}")
