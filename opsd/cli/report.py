"""`opsd report`: writes report.html and curves.png of a run."""

import argparse
from pathlib import Path

from opsd.common.display import Display


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `opsd report`."""
    parser.add_argument("directory", metavar="RUN_DIR", type=Path, help="a run's directory")


def run(parsed: argparse.Namespace) -> None:
    """Writes report.html and curves.png and says where. Raises UserError."""
    from opsd.report import write_report

    display = Display()
    for name, path in write_report(parsed.directory).items():
        display.note(f"{name}: {path}")
