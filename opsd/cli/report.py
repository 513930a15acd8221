"""`opsd report`: writes report.html and curves.png of a run."""

import argparse

from opsd.common.display import Display


def run(parsed: argparse.Namespace) -> None:
    """Writes report.html and curves.png and says where. Raises UserError."""
    from opsd.report import write_report

    display = Display()
    for name, path in write_report(parsed.directory).items():
        display.note(f"{name}: {path}")
