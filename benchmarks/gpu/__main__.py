"""A session on a GPU: thirty minutes, at most ten a call, without access to package registries.

On a machine with registries and nvcc, in the checkout's root:

    python -m benchmarks.gpu prepare     # wheels, both libraries and the commit, into .gpu (30 MB)

Then on the GPU machine, in a copy of the checkout with the ignored folder .gpu:

    python -m benchmarks.gpu check       # smoke, each term of the cost by itself, the tests
    python -m benchmarks.gpu bench       # python -m benchmarks --gpu
    python -m benchmarks.gpu step        # a step by each attention kernel, whole steps beside TRL's
    python -m benchmarks.gpu rest        # compute-sanitizer, ncu, whole runs

Fix what fails in `check` before the next call. Each call writes CALL.json (machine, driver,
versions, commit; for each part its command, exit, seconds, JSON, and what follows by `rules.py`)
and CALL.log to --output, whatever happens to its parts. --cpu rehearses the same parts, as far as a
CPU can run them.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .sitting import CALLS, WHEELS, Part

ROOT = Path.cwd()
CARRIED = ROOT / ".gpu"
TAIL = 60  # lines of each part that are shown; all lines are in the log
LIBRARIES = ("libopsd_cpu.so", "libopsd_cuda.so")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("call", choices=("prepare", *CALLS))
    parser.add_argument("--cpu", action="store_true", help="rehearse without a GPU")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")))
    options = parser.parse_args(arguments)
    if options.call == "prepare":
        return prepare()
    environment = surroundings(options.cpu)
    options.output.mkdir(parents=True, exist_ok=True)
    return run(options.call, options.output.resolve(), options.cpu, environment)


def prepare() -> int:
    """Put all that the other machine lacks and cannot fetch into one ignored folder."""
    wheels = CARRIED / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels)]
    download += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    download += [f"--platform={platform}" for platform in PLATFORMS]
    subprocess.run([*download, *WHEELS], check=True)
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, check=True, env=os.environ | {"OPSD_CPP": "1", "OPSD_CUDA": "1"})
    for name in LIBRARIES:
        shutil.copy(ROOT / "opsd_kernels" / name, CARRIED / name)
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    changes = subprocess.check_output([*git, "status", "--porcelain", "opsd_kernels", "csrc"])
    described = {"commit": commit, "uncommitted_changes": bool(changes.strip())}
    (CARRIED / "commit.json").write_text(json.dumps(described) + "\n")
    size = sum(x.stat().st_size for x in CARRIED.rglob("*") if x.is_file())
    print(f"{CARRIED}: {size / 2**20:.0f} MiB; take it along with the checkout")
    return 0


def surroundings(cpu: bool) -> dict[str, str]:
    """The environment of a call's parts; puts the wheels and the libraries in their places."""
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "OPSD_CARRIED": str(CARRIED),
    }
    if cpu:
        return environment
    for name in LIBRARIES:
        if not (ROOT / "opsd_kernels" / name).exists():
            shutil.copy(CARRIED / name, ROOT / "opsd_kernels" / name)
    site = CARRIED / "site"
    if not (site / ".done").exists():
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        install += ["--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site)]
        subprocess.run([*install, *map(str, (CARRIED / "wheels").glob("*.whl"))], check=True)
        (site / ".done").touch()
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run(call: str, output: Path, cpu: bool, environment: dict[str, str]) -> int:
    """Run every part of a call; returns 1 if one failed. The JSON is written again after each
    part.
    """
    describe = "import json; from benchmarks import machine; print(json.dumps(machine.describe()))"
    machine = subprocess.run(
        [sys.executable, "-c", describe], env=environment, capture_output=True, text=True
    )
    report: dict = {"call": call, "rehearsal": cpu, "parts": []}
    report["machine"] = json.loads(machine.stdout) if machine.returncode == 0 else machine.stderr
    print(json.dumps(report["machine"], indent=1))
    with open(output / f"{call}.log", "w") as log:
        for part in CALLS[call]:
            done = run_part(part, output, cpu, environment, log)
            report["parts"].append(done)
            (output / f"{call}.json").write_text(json.dumps(report, indent=1) + "\n")
            print(f"=== {part.name}: {done.get('left_out') or _ending(done)}", flush=True)
    return int(machine.returncode != 0 or any(done.get("exit") for done in report["parts"]))


def run_part(part: Part, output: Path, cpu: bool, environment: dict[str, str], log) -> dict:
    """Run a part within its time limit, with its output on the terminal and in `log`. Returns its
    record. Processes that it started end with it.
    """
    found: dict[str, Any] = {"name": part.name, "limit_seconds": part.seconds}
    arguments = part.rehearsal if cpu else part.arguments
    if isinstance(arguments, str):
        return found | {"left_out": arguments}
    program = sys.executable if part.tool is None else shutil.which(part.tool)
    if program is None:
        return found | {"left_out": f"there is no {part.tool} here"}
    places = {"{out}": str(output), "{python}": sys.executable}
    command = [program]
    for word in arguments:
        for place, path in places.items():
            word = word.replace(place, path)
        command.append(word)
    print(f"=== {part.name}: {' '.join(command)}", file=log, flush=True)
    began = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        process.wait(part.seconds)
    except subprocess.TimeoutExpired:
        found["timed_out"] = True
    finally:
        _end(process)
    log.flush()
    print("\n".join(Path(log.name).read_text().splitlines()[-TAIL:]), flush=True)
    found |= {"command": command, "exit": process.returncode}
    found["seconds"] = round(time.monotonic() - began, 1)
    named = [Path(word) for word in command if word.endswith(".json")]
    kept = named[-1] if named else output / part.results
    if kept.is_file():
        found["results"] = json.loads(kept.read_text())
        if named:
            kept.unlink()
    if "results" in found and not cpu:
        from .rules import OF_PARTS  # imports torch and our kernels, which lie there by now

        if judge := OF_PARTS.get(part.name):
            found["verdicts"] = judge(found["results"])
            print("\n".join(found["verdicts"]), flush=True)
    return found


def _end(process: subprocess.Popen) -> None:
    """Kill the process and its children, which have a session of their own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _ending(done: dict) -> str:
    over = ", out of time" if done.get("timed_out") else ""
    return f"exit {done['exit']} after {done['seconds']} s of {done['limit_seconds']}{over}"


if __name__ == "__main__":
    sys.exit(main())
