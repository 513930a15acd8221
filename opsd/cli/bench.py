"""`opsd bench`: the benchmark of the kernels, as `python -m benchmarks` in a clone."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the benchmark."""
    from opsd_kernels.benchmarks.__main__ import add_arguments as add

    add(parser)


def run(parsed: argparse.Namespace) -> int:
    """Measures, and writes JSON and a page."""
    from opsd_kernels.benchmarks.__main__ import run

    return run(parsed)
