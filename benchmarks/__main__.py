"""`python -m benchmarks`: measures linear_divergence, linear_log_prob, their peers and the bare
matrix products.

Writes results.json, after every case, and index.html. The exit status is 1 if a result was wrong.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import torch

from . import candidates, machine, suite
from .measure import measure
from .problem import DTYPES, Case

KNOWN = (
    "ours",
    "dense",
    "compiled",
    "torch chunked",
    "trl",
    "liger",
    "liger cute",
    "liger chunked",
    "cce",
    "cce exact",
    "quack",
)
"""The candidates that --only may name."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(arguments), arguments)


def run(options: argparse.Namespace, arguments: list[str] | None = None) -> int:
    """Run the measurements; returns the exit status."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda" if options.gpu else "cpu"
    if options.gpu and not torch.cuda.is_available():
        print("--gpu: there is no CUDA device here", file=sys.stderr)
        return 2
    rows = _rows(options)
    rounds = options.rounds or (3 if options.quick else 5)
    minutes = options.minutes
    if minutes is None:
        minutes = 9.0 if options.gpu else float("inf")
    began = time.monotonic()
    report = {
        "machine": machine.describe(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "command": " ".join(["python -m benchmarks", *(arguments or sys.argv[1:])]),
        "shared": options.shared,
        "rounds": rounds,
        "missing": {},
        "left_out": [],
        "rows": [],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    for row in rows:
        left = 60 * minutes - (time.monotonic() - began)
        if left < 0:
            report["left_out"].append(row.case.label)
            continue
        run, missing = _candidates(row, device, options.only)
        for name, reason in missing.items():
            if name not in report["missing"]:
                print(f"missing: {name}: {reason}")
        report["missing"] |= missing
        measured = measure(row.case, device, run, rounds, min(60, left / 4))
        report["rows"].append(measured)
        print("\n".join(_lines(row.case, measured, options.shared)), flush=True)
        _write(options.output / "results.json", json.dumps(report, indent=1) + "\n")
    for label in report["left_out"]:
        print(f"not run, the time was over: {label}")
    _write(options.output / "results.json", json.dumps(report, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no page: no matplotlib here; elsewhere: python -m benchmarks.page {options.output}")
    else:
        from .page import page

        _write(options.output / "index.html", page(report))
    print(f"written: {options.output}, after {time.monotonic() - began:.0f} s")
    return int(any(row["red"] for row in report["rows"]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command line, which `opsd bench` has too."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--quick", action="store_true", help="run a few cases only, under three minutes"
    )
    which.add_argument("--gpu", action="store_true", help="run on the GPU, within ten minutes")
    which.add_argument(
        "--shape", type=_shape, metavar="N,V,D", help="run every task at this shape only"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="type of the tensors, with --shape (default: float32)",
    )
    parser.add_argument(
        "--only", type=_names, metavar="NAME,…", help="measure these candidates only; ours always"
    )
    parser.add_argument(
        "--rounds", type=int, help="interleaved rounds (default: 5; with --quick 3)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="begin no case after this many minutes (default with --gpu: 9)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--shared",
        action="store_true",
        help="other programs use this machine: show processor seconds",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), metavar="DIR")


def _names(text: str) -> str:
    if unknown := set(text.split(",")) - {*KNOWN}:
        named = ", ".join(sorted(unknown))
        raise argparse.ArgumentTypeError(f"no {named}; there are {', '.join(KNOWN)}")
    return text


def _shape(text: str) -> tuple[int, int, int]:
    words = text.split(",")
    if len(words) != 3 or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"got {text!r}, must be three numbers N,V,D above 0")
    tokens, vocabulary, width = map(int, words)
    return tokens, vocabulary, width


def _rows(options: argparse.Namespace) -> list[suite.Row]:
    if options.shape:
        tokens, vocabulary, width = options.shape
        return suite.one_shape(Case(tokens, vocabulary, width, options.dtype))
    return (suite.quick if options.quick else suite.gpu if options.gpu else suite.cpu)()


def _candidates(row: suite.Row, device: str, only: str | None) -> tuple[dict, dict[str, str]]:
    found, missing = candidates.candidates(row.case.task, device)
    if not row.compiled:
        found = {k: run for k, run in found.items() if k not in candidates.COMPILES[device]}
    if row.backends:
        more, lacking = candidates.our_backends(device)
        found, missing = found | more | candidates.our_others(row.case.task), missing | lacking
    found |= candidates.our_budgets(row.budgets)
    if only is not None:
        wanted = {"ours", *only.split(",")}
        found = {name: run for name, run in found.items() if name in wanted}
        missing = {name: reason for name, reason in missing.items() if name in wanted}
    return found, missing


def _lines(case: Case, row: dict, shared: bool) -> list[str]:
    times = row["cpu_seconds" if shared else "seconds"]
    lines = [case.label]
    for name, t in sorted(times.items(), key=lambda item: item[1]["min"]):
        peak = row["peak_bytes"].get(name)
        memory = "" if peak is None else f"{(peak - row['gradient_bytes']) / 2**20:8.0f} MiB"
        lines.append(
            f"  {name:16}{t['min'] * 1e3:10.1f} ms  median {t['median'] * 1e3:10.1f}"
            f"{t['min'] / times['gemms']['min']:8.2f} x GEMM{memory}"
        )
    for what in ("red", "failed"):
        lines += [
            f"  {what.upper()}, not timed: {name}: {reason}" for name, reason in row[what].items()
        ]
    return lines


def _write(path: Path, text: str) -> None:
    """Write the file completely or not at all: a run may be killed at any time."""
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


if __name__ == "__main__":
    sys.exit(main())
