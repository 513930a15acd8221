"""Kill a training run at random moments, resume it, and compare it with one that nobody disturbed.

    python -m tests.helpers.kills --kills 20 --method opsd

Each trial starts the same run anew, kills it (SIGKILL) once or more, resumes it to its end, and
compares losses, tokens, evaluations, samples and weights bit for bit. Half of the kills come at a
random time; the others a few milliseconds after a file begins to change, so that checkpoints,
evaluations and the log are hit while they are written. Processes are forked from one that has
imported everything, since importing takes longer than the run.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `helpers`

from helpers.training_cases import short_config, timeless, write_model, write_rows
from opsd.cli.main import main
from opsd.common.files import read_lines
from opsd.config.load import save_config
from opsd.runs.log import FILES
from opsd.training import run as _imported  # noqa: F401 - what a run needs, before the forks

METHODS = {
    "opsd": {},
    "ema": {"method": "opsd", "teacher": {"policy": "ema"}},
    "lora": {"method": "opsd", "model": {"lora": {"rank": 4, "alpha": 8}}},
    "grpo": {"method": "grpo", "rollout": {"group_size": 4}},
    "sft": {"method": "sft"},
}
MOMENTS = {
    "a checkpoint": ".checkpoint-*.part",
    "a checkpoint's end": "checkpoint-2/manifest.json",
    "an evaluation": "evaluations.jsonl",
    "samples": "samples.jsonl",
    "a step": "metrics.jsonl",
    "the report": ".report.html.*.part",
}
"""What is about to be written, and the file whose change tells."""


def run(config: Path, resume: bool) -> int:
    """Start `opsd train` in a process of its own; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        code = main(["train", str(config), *(["--resume", "--start-over"] if resume else [])])
    finally:
        os._exit(code)


def ended(child: int) -> bool:
    """Whether the process is over, without waiting. Raises when it has failed."""
    done, status = os.waitpid(child, os.WNOHANG)
    if done and status:
        raise SystemExit(f"the run failed: wait status {status}")
    return bool(done)


def finish(child: int) -> None:
    """Wait for the end of the process."""
    while not ended(child):
        time.sleep(0.005)


def moments(draw: random.Random) -> Iterator[str]:
    """When to kill: half of the times any time, else each of MOMENTS as often as the others."""
    while True:
        deck = [*MOMENTS, *["any time"] * len(MOMENTS)]
        draw.shuffle(deck)
        yield from deck


def kill(child: int, directory: Path, moment: str, draw: random.Random, duration: float) -> bool:
    """Kill the process at this moment; returns whether it was not over before."""
    begun = time.monotonic()
    if moment == "any time":
        until = begun + draw.uniform(0, duration)
        due = lambda: time.monotonic() >= until  # noqa: E731
    else:
        # The report is written once, and goes to its place.
        pattern, turn = MOMENTS[moment], draw.randint(1, 2 if "report" in moment else 3)
        seen = [stamp(directory, pattern)]

        def due() -> bool:
            now = stamp(directory, pattern)
            if now != seen[-1]:
                seen.append(now)
            return len(seen) > turn

    while not due():
        if ended(child):
            return False
    if moment != "any time":
        time.sleep(draw.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def stamp(directory: Path, pattern: str) -> tuple[int, int] | None:
    """Changes when the first file of this pattern does."""
    try:
        found = next(directory.glob(pattern), directory / pattern).stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size


def outcome(directory: Path) -> dict:
    """All that a run must do alike, however often it was killed."""
    lines = {name: timeless(read_lines(directory / name)) for name in FILES}
    (weights,) = (directory / "model").glob("*.safetensors")
    for name in ("report.html", "curves.png", "summary.json"):
        assert (directory / name).stat().st_size > 500, name
    return {**lines, "weights": load_file(weights)}


def differences(one: dict, other: dict) -> list[str]:
    """What differs between two outcomes."""
    found = [name for name in FILES if one[name] != other[name]]
    first, second = one["weights"], other["weights"]
    if first.keys() != second.keys() or not all(torch.equal(first[k], second[k]) for k in first):
        found.append("weights")
    return found


def trials(kills: int, method: str, seed: int, root: Path) -> int:
    """Run them; prints a line each; returns how many ended otherwise than undisturbed."""
    torch.set_num_threads(1)  # a fork has no other threads
    write_model(root / "model")
    write_rows(root / "rows.jsonl")
    more = {"train": {"steps": 6}, **METHODS[method]}

    def configured(name: str) -> tuple[Path, Path]:
        config = short_config(root / "model", root / "rows.jsonl", root / name, **more)
        save_config(config, root / f"{name}.yaml")
        return root / f"{name}.yaml", root / name

    begun = time.monotonic()
    config, directory = configured("undisturbed")
    finish(run(config, False))
    duration, wanted = time.monotonic() - begun, outcome(directory)
    steps = [line["step"] for line in wanted["metrics.jsonl"]]
    assert steps == [1, 2, 3, 4, 5, 6], steps
    draw, done, failed, counts = random.Random(seed), 0, 0, Counter()
    deck = moments(draw)
    while done < kills:
        config, directory = configured("disturbed")
        shutil.rmtree(directory, ignore_errors=True)
        hits, resume = [], False
        # Now and then a run is killed again after it was resumed.
        for _ in range(draw.choice([1, 1, 2])):
            child, moment = run(config, resume), next(deck)
            if not kill(child, directory, moment, draw, duration):
                break
            resume = directory.exists()
            hits.append(moment)
        if not hits:
            continue
        finish(run(config, True))
        found = differences(wanted, outcome(directory))
        done, failed = done + len(hits), failed + bool(found)
        counts.update(hits)
        state = f"differs in {', '.join(found)}" if found else "bit for bit the same"
        print(f"{done:3d}  killed at {', '.join(hits)}: {state}", flush=True)
    where = ", ".join(f"{count} at {moment}" for moment, count in counts.items())
    print(f"{method}: {done} kills ({where}); {failed} runs ended differently")
    return failed


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--method", choices=METHODS, default="opsd")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    asked = parse()
    with tempfile.TemporaryDirectory() as place:
        sys.exit(min(trials(asked.kills, asked.method, asked.seed, Path(place)), 1))
