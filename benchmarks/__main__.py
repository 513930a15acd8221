"""`python -m benchmarks`: the fused divergence against dense autograd, TRL and bare products."""

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks import candidates, machine
from benchmarks.measure import Disagreement, measure

CASES = [
    ("forward_kl", True),
    ("forward_kl", False),
    ("reverse_kl", False),
    ("jsd", True),
    ("jsd", False),
]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024, help="N (default 1024)")
    parser.add_argument("--vocabulary", type=int, default=32768, help="V (default 32768)")
    parser.add_argument("--width", type=int, default=512, help="D (default 512)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved repetitions (default 5)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--quick", action="store_true", help="N=256, V=8192, three rounds")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks.json"))
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.vocabulary, options.rounds = 256, 8192, 3
    if options.threads:
        torch.set_num_threads(options.threads)

    found, missing = candidates.peers()
    for name, reason in missing.items():
        print(f"missing: {name} ({reason})")
    rows, refused = [], []
    print(f"N={options.tokens} V={options.vocabulary} D={options.width} fp32, minimum of rounds")
    print(f"{'':24}{'ours':>9}{'x GEMM':>8}{'x dense':>9}{'x TRL':>7}   peak MiB: ours, dense, TRL")
    for divergence, trainable in CASES:
        label = f"{divergence} {'trainable' if trainable else 'frozen'}"
        try:
            row = measure(
                options.tokens,
                options.vocabulary,
                options.width,
                divergence,
                trainable,
                options.rounds,
                found,
                candidates.gemms,
            )
        except Disagreement as error:
            refused.append(f"{label}: {error}")
            print(f"{label:24}refused: {error}")
            continue
        rows.append(row)
        print(_line(label, row))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine.describe(), "missing": missing, "refused": refused, "rows": rows}
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {options.output}")
    return 1 if refused else 0


def _line(label: str, row: dict) -> str:
    seconds = {name: t["min"] for name, t in row["seconds"].items()}

    def times(name: str) -> str:
        return f"{seconds['ours'] / seconds[name]:.2f}" if name in seconds else "-"

    def mebibytes(name: str) -> str:
        peak = row["peak_bytes"].get(name)
        return "-" if peak is None else f"{peak / 2**20:.0f}"

    memory = ", ".join(mebibytes(name) for name in ("ours", "dense", "trl"))
    return (
        f"{label:24}{seconds['ours']:8.3f}s{times('gemms'):>8}{times('dense'):>9}{times('trl'):>7}"
        f"   {memory}"
    )


if __name__ == "__main__":
    sys.exit(main())
