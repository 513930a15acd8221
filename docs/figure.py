"""Draws docs/kernel-cpu.svg: the committed CPU figures of the kernel, as bars."""

import json
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "cpu-epyc-zen5-2-cores.json"
NAMES = {"gemms": "bare products", "ours": "opsd_kernels", "dense": "dense", "trl": "TRL"}
STYLE = """
    .card { fill: #fff; stroke: #c8ccd4 } .ink { fill: #1f2430 } .quiet { fill: #5b6472 }
    .gemms { fill: #8a93a3 } .ours { fill: #b9581f } .dense { fill: #3f6fa5 } .trl { fill: #3d7d3a }
    @media (prefers-color-scheme: dark) {
      .card { fill: #1d2129; stroke: #3c4350 } .ink { fill: #e6e9ef } .quiet { fill: #a7b0bf }
      .ours { fill: #e0823f } .dense { fill: #6f9fd4 } .trl { fill: #6bb567 }
    }
"""
LEFT, WIDTH, BAR = 104, 186, 16


def kernel_figure() -> str:
    """The SVG: a group of bars a task, minimum seconds and the memory that a call adds."""
    rows = json.loads(RESULTS.read_text())["rows"]
    per_second = WIDTH / max(max(t["min"] for t in row["seconds"].values()) for row in rows)
    parts, y = [], 28
    for row in rows:
        parts.append(text("ink", 20, y, f"{row['divergence']}, {row['head']} head", bold=True))
        y += 8
        for name, label in NAMES.items():
            seconds = row["seconds"][name]["min"]
            length = seconds * per_second
            peak = row["peak_bytes"].get(name)
            memory = "" if peak is None else f", {peak / 2**20:.0f} MiB"
            parts.append(text("quiet", LEFT - 8, y + 12, label, end=True))
            parts.append(
                f'<rect class="{name}" x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR - 3}"/>'
            )
            shown = f"{seconds:.2f} s{memory}"
            parts.append(text("quiet", LEFT + length + 6, y + 11, shown))
            y += BAR
        y += 26
    height = y - 10
    lines = "\n  ".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 420 {height}" width="420" '
        'font-family="system-ui, sans-serif" font-size="12" role="img" '
        'aria-label="Seconds and memory of the kernel, dense autograd and TRL">\n'
        f"  <style>{STYLE}  </style>\n"
        f'  <rect class="card" x=".5" y=".5" width="419" height="{height - 1}" rx="8"/>\n'
        f"  {lines}\n</svg>\n"
    )


def text(kind: str, x: float, y: float, words: str, bold: bool = False, end: bool = False) -> str:
    more = ' font-weight="600"' * bold + ' text-anchor="end"' * end
    return f'<text class="{kind}" x="{x:.1f}" y="{y}"{more}>{words}</text>'
