"""`opsd bench`: the benchmark of the kernels, as `python -m benchmarks` in a clone."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the benchmark, which reads them itself."""
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="[--quick --gpu --help …]")
    parser.add_help = False


def run(parsed: argparse.Namespace) -> None:
    """Measures, and writes JSON and a page."""
    from opsd_kernels.benchmarks.__main__ import main

    main(parsed.arguments)
