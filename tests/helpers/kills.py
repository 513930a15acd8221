"""Interrupt a command at random moments, resume it, and compare it with an undisturbed one.

    python -m tests.helpers.kills --kills 20 --command train --method opsd --signal any
    python -m tests.helpers.kills --kills 40 --damage

Each trial starts the same command, sends it one or more signals, resumes it, and compares all that
it wrote bit for bit: losses, tokens, evaluations, samples, weights. Half of the signals come at a
random time; the others a few milliseconds after a file begins to change, so that checkpoints,
evaluations and the log are interrupted while they are written. With `--damage` a random file of the
checkpoint is changed before: resuming must refuse it by name. Processes are forked from one that
has imported everything, since importing takes longer than the run.
"""

import argparse
import atexit
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `helpers`

from helpers.lines import read_lines
from helpers.training_cases import short_config, timeless, write_model, write_rows
from helpers.vllm_server import FakeVLLM
from opsd.cli.main import main
from opsd.common.ending import end_with_parent
from opsd.common.files import try_lock
from opsd.compare import study as studies
from opsd.config.load import save_config
from opsd.evaluate import answers as _imported_too  # noqa: F401 - what a command needs, before the
from opsd.quickstart import tiny_model, tiny_recipe
from opsd.runs.directory import checkpoints_in
from opsd.runs.log import FILES
from opsd.training import run as _imported  # noqa: F401 - forks

METHODS = {
    "opsd": {},
    "ema": {"method": "opsd", "teacher": {"policy": "ema"}},
    "lora": {"method": "opsd", "model": {"lora": {"rank": 4, "alpha": 8}}},
    "grpo": {"method": "grpo", "rollout": {"group_size": 4}},
    "sft": {"method": "sft"},
    "ahead": {"rollout": {"engine": "vllm_server", "ahead": 1, "group_size": 2}},
}
SIGNALS = {
    "kill": [signal.SIGKILL],
    "term": [signal.SIGTERM],
    "int": [signal.SIGINT],
    "stop": [signal.SIGSTOP, signal.SIGCONT],  # the process continues after these
}
PAUSE = 0.2  # seconds for which a process is stopped
SOME_TIME = "some time"


@dataclass(frozen=True)
class Command:
    """A command that is interrupted.

    start: its arguments; again: the arguments with which it resumes. moments: what is about to be
    written → the file in `place` whose change shows it. outcome: the results that must be the same
    however often it is interrupted.
    """

    start: list[str]
    again: list[str]
    place: Path
    outcome: Callable[[Path], Any]
    moments: dict[str, str] = field(default_factory=dict)


def training(root: Path, name: str, method: str) -> Command:
    """`opsd train` with six steps and two evaluations."""
    place, file = root / name, root / f"{name}.yaml"
    more = {"train": {"steps": 6}, **METHODS[method]}
    if method == "ahead":
        more["rollout"] = {**more["rollout"], "server": address_of_server(root / "model")}
    save_config(short_config(root / "model", root / "rows.jsonl", place, **more), file)
    moments = {
        "a checkpoint": ".checkpoint-*.part",
        "a checkpoint's end": "checkpoint-2/manifest.json",
        "an evaluation": "evaluations.jsonl",
        "samples": "samples.jsonl",
        "a step": "metrics.jsonl",
        "the report": ".report.html.*.part",
    }
    start = ["train", str(file)]
    return Command(start, [*start, "--resume", "--start-over"], place, trained, moments)


@cache
def address_of_server(model: Path) -> str:
    """The address of a stand-in for vLLM, in a process of its own until this one ends."""
    told, tells = os.pipe()
    child = os.fork()
    if not child:
        os.write(tells, FakeVLLM(model).address.encode() + b"\n")
        while True:
            signal.pause()
    atexit.register(os.kill, child, signal.SIGKILL)
    with open(told) as file:
        return file.readline().strip()


def trained(place: Path) -> dict[str, Any]:
    """The log and the weights of a run."""
    for name in ("report.html", "curves.png", "summary.json"):
        assert (place / name).stat().st_size > 500, name
    (file,) = (place / "model").glob("*.safetensors")
    weights = {name: tensor.tolist() for name, tensor in load_file(file).items()}
    return {name: timeless(read_lines(place / name)) for name in FILES} | {"weights": weights}


def quickstart(root: Path, name: str, method: str) -> Command:
    """`opsd quickstart --tiny` with a short base training and two methods."""
    place = root / name
    words = ["--tiny", "--steps", "2", "--problems", "8", "--methods", "opsd,sft"]
    start = ["quickstart", *words, "--output", str(place)]
    moments = {"the base": "base/*", "a step": "opsd/metrics.jsonl", "a model": "opsd/.model.*"}

    def outcome(place: Path) -> dict[str, Any]:
        return {name: trained(place / name) for name in ("opsd", "sft")}

    return Command(start, [*start, "--resume"], place, outcome, moments)


def evaluation(root: Path, name: str, method: str) -> Command:
    """`opsd eval`, one question at a time."""
    place = root / name
    where = [str(root / "model"), "--benchmark", str(root / "rows.jsonl"), "--output", str(place)]
    how = ["--samples", "4", "--temperature", "1", "--max-new-tokens", "12", "--batch-size", "2"]
    start = ["eval", *where, *how]
    moments = {"answers": "completions-1-of-1.jsonl", "the result": ".result.json.*.part"}

    def outcome(place: Path) -> dict[str, Any]:
        result = json.loads((place / "result.json").read_text())
        answers = timeless(read_lines(place / "answers.jsonl"))
        return {"answers": answers, "pass_at_k": result["pass_at_k"]}

    return Command(start, start, place, outcome, moments)


def comparison(root: Path, name: str, method: str) -> Command:
    """`opsd compare` of a study with two seeds, in parallel."""
    file, place = root / f"{name}.yaml", root / name
    study = {"quickstart": "tiny", "methods": ["opsd", "sft"], "seeds": [0, 1], "steps": 2}
    file.write_text(yaml.safe_dump({**study, "problems": 8, "baseline": "sft"}))
    start = ["compare", str(file), "--output", str(place)]
    moments = {"a step": "*/seed-0/opsd/metrics.jsonl", "the end": ".comparison.json.*.part"}

    def outcome(place: Path) -> dict[str, Any]:
        runs = sorted(path.parent for path in place.glob("*/seed-*/*/metrics.jsonl"))
        assert len(runs) == 4 and (place / "comparison.html").stat().st_size > 500
        return {str(run.relative_to(place)): trained(run) for run in runs}

    return Command(start, start, place, outcome, moments)


COMMANDS = {
    "train": training,
    "quickstart": quickstart,
    "eval": evaluation,
    "compare": comparison,
}


def in_short() -> None:
    """Shorten the commands: a tiny base of three steps, few worksheets, and forks for a study's
    runs.
    """
    short = replace(tiny_model.BaseTraining(), steps=3, batch_size=8)
    tiny_model.cached_base.__defaults__ = (short,)
    tiny_model.BaseTraining = lambda: short
    tiny_recipe.TRAIN_ROWS = 16
    tiny_recipe.SECTIONS["train"]["problems_per_step"] = 8
    tiny_recipe.SECTIONS["rollout"]["max_new_tokens"] = 8

    class Forked:
        returncode = None

        def __init__(self, job, threads, watched, gpu=None):
            def watch() -> None:
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.default_int_handler)
                end_with_parent(watched)

            self.child = run(job.command, watch)

        def poll(self):
            if self.returncode is None:
                done, status = os.waitpid(self.child, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if done else None
            return self.returncode

        def terminate(self):
            if self.poll() is None:
                os.kill(self.child, signal.SIGTERM)

        def wait(self):
            while self.poll() is None:
                time.sleep(0.005)

    studies._start = Forked


def run(arguments: list[str], first: Callable[[], object] = lambda: None) -> int:
    """Start `opsd` in a process of its own; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        first()
        torch.set_num_threads(1)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        code = main(arguments)
    finally:
        os._exit(code)


def ended(child: int, fine: tuple[int, ...] = (0,)) -> bool:
    """Whether the process is over, without waiting. Raises SystemExit if it failed."""
    done, status = os.waitpid(child, os.WNOHANG)
    if done and os.waitstatus_to_exitcode(status) not in fine:
        raise SystemExit(f"the run failed: wait status {status}")
    return bool(done)


def finish(child: int, fine: tuple[int, ...] = (0,)) -> None:
    """Wait for the end of the process."""
    while not ended(child, fine):
        time.sleep(0.005)


def moments(command: Command, draw: random.Random) -> Iterator[str]:
    """Yield when to interrupt: half of the times at a random time, otherwise each moment equally
    often.
    """
    while True:
        deck = [*command.moments, *[SOME_TIME] * len(command.moments)]
        draw.shuffle(deck)
        yield from deck


def interrupt(
    child: int, command: Command, moment: str, name: str, draw: random.Random, duration: float
) -> bool:
    """Send the signal at this moment; returns whether the process was still running."""
    begun = time.monotonic()
    if moment == SOME_TIME:
        until = begun + draw.uniform(0, duration)
        due = lambda: time.monotonic() >= until  # noqa: E731
    else:
        # The report is written once, to a temporary file that is then renamed.
        pattern = command.moments[moment]
        turn = draw.randint(1, 2 if ".part" in pattern else 3)
        seen = [stamp(command.place, pattern)]

        def due() -> bool:
            now = stamp(command.place, pattern)
            if now != seen[-1]:
                seen.append(now)
            return len(seen) > turn

    while not due():
        if ended(child):
            return False
        time.sleep(0.0005)
    if moment != SOME_TIME:
        time.sleep(draw.uniform(0, 0.02))
    for number in SIGNALS[name]:
        os.kill(child, number)
        time.sleep(PAUSE if number == signal.SIGSTOP else 0)
    finish(child, (0, -signal.SIGKILL, 128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGTERM))
    return True


def wait_for_orphans(place: Path) -> None:
    """Wait until the runs of a killed study have ended: they first save their last step, and hold
    the locks of their directories until then."""
    for lock in place.rglob("run.lock"):
        with lock.open("ab") as file:
            while try_lock(file) is False:
                time.sleep(0.01)


def stamp(directory: Path, pattern: str) -> tuple[int, int] | None:
    """A value that changes when the first file of this pattern does."""
    try:
        found = next(directory.glob(pattern), directory / pattern).stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size


def damage(place: Path, draw: random.Random) -> str | None:
    """Change a random file of the newest checkpoint; returns its name, or None without a
    checkpoint.
    """
    found = checkpoints_in(place)
    if not found:
        return None
    file = draw.choice(sorted(path for path in found[-1].rglob("*") if path.stat().st_size > 4))
    content = bytearray(file.read_bytes())
    kind = draw.choice(["a bit", "cut", "zeros", "gone"])
    if kind == "a bit":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        content = content[: draw.randrange(len(content))]
    elif kind == "zeros":
        content = bytearray(len(content))
    file.write_bytes(content)
    if kind == "gone":
        file.unlink()
    return f"{file.relative_to(place)} ({kind})"


def is_refused(command: Command, name: str) -> bool:
    """Whether resuming ends with one line that names the checkpoint's file."""
    with tempfile.TemporaryFile("w+") as said, redirect_stderr(said):
        code = main(command.again)
        said.seek(0)
        told = said.read()
    return code == 1 and name in told and told.count("\n") == 1


def trials(asked: argparse.Namespace, root: Path) -> int:
    """Run the trials and print a line for each; returns how many had other results than
    undisturbed.
    """
    torch.set_num_threads(1)  # a fork has no other threads
    os.environ["OPSD_CACHE"] = str(root / "cache")
    in_short()
    write_model(root / "model")
    write_rows(root / "rows.jsonl")
    make, draw = COMMANDS[asked.command], random.Random(asked.seed)
    command = make(root, "undisturbed", asked.method)
    finish(run(command.start))  # this also fills the caches
    shutil.rmtree(command.place)
    begun = time.monotonic()
    finish(run(command.start))
    duration, wanted = time.monotonic() - begun, command.outcome(command.place)
    command = make(root, "disturbed", asked.method)
    deck, done, failed, counts = moments(command, draw), 0, 0, Counter()
    while done < asked.kills:
        shutil.rmtree(command.place, ignore_errors=True)
        hits, arguments = [], command.start
        # Sometimes a run is interrupted again after it resumed.
        for _ in range(draw.choice([1, 1, 2])):
            name = draw.choice(list(SIGNALS)) if asked.signal == "any" else asked.signal
            child, moment = run(arguments), next(deck)
            if not interrupt(child, command, moment, name, draw, duration):
                break
            arguments = command.again if command.place.exists() else command.start
            hits.append(f"{name} at {moment}")
            wait_for_orphans(command.place)
        if not hits:
            continue
        if asked.damage:
            what = damage(command.place, draw)
            if what is None:
                continue
            noticed = is_refused(command, what.partition(" (")[0])
            done, failed = done + 1, failed + (not noticed)
            print(f"{done:3d}  {what}: {'refused' if noticed else 'NOT NOTICED'}", flush=True)
            continue
        finish(run(arguments))
        got = command.outcome(command.place)
        found = [name for name in wanted if wanted[name] != got[name]]
        done, failed = done + len(hits), failed + bool(found)
        counts.update(hits)
        state = f"differs in {', '.join(found)}" if found else "bit for bit the same"
        print(f"{done:3d}  {', '.join(hits)}: {state}", flush=True)
    for hit, count in sorted(counts.items()):
        print(f"     {count:3d} {hit}")
    end = "damages went unnoticed" if asked.damage else "runs ended differently"
    print(f"{asked.command} {asked.method}, seed {asked.seed}: {done} kills; {failed} {end}")
    return failed


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--command", choices=COMMANDS, default="train")
    parser.add_argument("--method", choices=METHODS, default="opsd", help="of `train`")
    parser.add_argument("--signal", choices=[*SIGNALS, "any"], default="kill")
    parser.add_argument("--damage", action="store_true", help="of `train`: change a file between")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    asked = parse()
    with tempfile.TemporaryDirectory() as place:
        sys.exit(min(trials(asked, Path(place)), 1))
