"""`python -m tests.helpers.ahead_time`: a step with `rollout.ahead` against one without, in turn.

Two processes: this one trains, another is the stand-in of a vLLM server, which really samples. On a
machine that has no core for each, the server's own time is not another machine's: `--latency` adds
seconds to each of its answers that cost no processor time.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import itertools

import psutil
import torch

from helpers.lines import read_lines
from helpers.training_cases import make_model, quiet, short_values, write_rows
from helpers.vllm_server import FakeVLLM
from opsd.config.load import merge, parse_config
from opsd.quickstart import tiny_model as tiny
from opsd.training import run as training

STEPS = 13  # the first is not counted: it samples two steps' rollouts


def serve(model: Path, latency: float) -> None:
    """Until it is killed."""
    torch.set_num_threads(1)
    server = FakeVLLM(model)
    server.delay = latency
    print(server.address, flush=True)
    threading.Event().wait()


def measure(root: Path, server: psutil.Process, address: str, ahead: int, epochs: int) -> dict:
    """Medians over the steps of a run, in seconds; processor seconds are means."""
    values = merge(
        short_values(root / "model", root / "rows.jsonl", Path(tempfile.mkdtemp(dir=root))),
        {
            "rollout": {
                "engine": "vllm_server",
                "server": address,
                "ahead": ahead,
                "group_size": 4,
                "max_new_tokens": 24,
            },
            "train": {
                "steps": STEPS,
                "problems_per_step": 4,
                "inner_epochs": epochs,
                "save_every": 0,
                "learning_rate": 1e-5,
            },
            "eval": {"problems": 0},
        },
    )
    begun, before = time.process_time(), sum(server.cpu_times()[:2])
    training.train(parse_config(values), quiet())
    spent = time.process_time() - begun, sum(server.cpu_times()[:2]) - before
    lines = read_lines(Path(values["output"]["dir"]) / "metrics.jsonl")
    ends = [line["seconds"] for line in lines]
    return {
        "step": statistics.median(b - a for a, b in itertools.pairwise(ends)),
        "rollout": statistics.median(line["rollout_seconds"] for line in lines[1:]),
        "trainer_processor": spent[0] / STEPS,
        "server_processor": spent[1] / STEPS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8, help="how often a step's rollouts train")
    parser.add_argument("--latency", type=float, default=0.0)
    asked = parser.parse_args()
    if asked.serve:
        return serve(asked.serve, asked.latency)
    torch.set_num_threads(1)
    training.write_report = lambda directory: None
    with tempfile.TemporaryDirectory() as place:
        root, tokenizer = Path(place), tiny.make_tokenizer()
        sizes = {"hidden_size": 192, "intermediate_size": 512, "head_dim": 48}
        make_model(0, tokenizer, **sizes).save_pretrained(root / "model")
        tokenizer.save_pretrained(root / "model")
        write_rows(root / "rows.jsonl")
        command = [sys.executable, __file__, "--serve", str(root / "model")]
        command += ["--latency", str(asked.latency)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                address, server = process.stdout.readline().strip(), psutil.Process(process.pid)
                found: dict[int, list[dict]] = {0: [], 1: []}
                for number in range(2 * asked.rounds):
                    ahead = (number + number // 2) % 2  # 0 1 1 0
                    found[ahead].append(measure(root, server, address, ahead, asked.epochs))
                    print(ahead, {k: round(v, 3) for k, v in found[ahead][-1].items()}, flush=True)
            finally:
                process.kill()
    one, other = (
        {key: statistics.median(each[key] for each in runs) for key in runs[0]}
        for runs in found.values()
    )
    sampling, training_ = one["rollout"], one["step"] - one["rollout"]
    print(
        f"one after the other {one['step']:.3f} s a step: sampling {sampling:.3f}, training "
        f"{training_:.3f}; ahead {other['step']:.3f} s: {one['step'] / other['step']:.2f} times "
        f"as fast; the longer of both is {max(sampling, training_):.3f}"
    )


if __name__ == "__main__":
    main()
