"""Directories that are saved whole or not at all, and known again: checkpoints, models, caches.

Each has a manifest, written last, with the size and the SHA-256 of every file. What a manifest does
not list was not saved with the directory, and its readers ignore it.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opsd.common.errors import UserError
from opsd.common.files import move, remove, sync, unfinished, write_json

MANIFEST = "manifest.json"
FORMAT = "opsd 1"  # other software has manifests, too
_READERS = 8  # files that are hashed at once


@contextmanager
def new_directory(path: Path, facts: dict[str, Any] | None = None) -> Iterator[Path]:
    """A directory to fill, which at the end takes the place of `path`, with these facts in its
    manifest; or nothing is left of it."""
    beside = unfinished(path)
    beside.mkdir(parents=True)
    try:
        yield beside
        _seal(beside, facts or {})
        if path.exists() or path.is_symlink():
            remove(path)
        move(beside, path)
    except BaseException:
        remove(beside)
        raise


def _seal(directory: Path, facts: dict[str, Any]) -> None:
    """Write the manifest, when the disk has all else."""

    def settle(name: str) -> dict[str, Any]:
        sync(directory / name)
        return _measured(directory / name)

    readable(directory)
    names = _files(directory)
    with ThreadPoolExecutor(_READERS) as pool:  # the disk writes one while another is hashed
        entries = dict(zip(names, pool.map(settle, names), strict=True))
    for inner in (path for path in directory.rglob("*") if path.is_dir()):
        sync(inner)
    manifest = {"format": FORMAT, "files": entries, **facts}
    write_json(directory / MANIFEST, manifest | {"sha256": _own_sha256(manifest)})


def readable(directory: Path) -> None:
    """Let those read the files who may read the directory, as the umask has it: safetensors lets
    nobody but their owner."""
    for name in _files(directory):
        (directory / name).chmod(directory.stat().st_mode & 0o666)


def read_manifest(directory: Path, field: str = "") -> dict[str, Any] | None:
    """The directory's manifest; None where it has none of ours. Raises UserError where it is
    damaged."""
    file = directory / MANIFEST
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            return None
        if found.pop("sha256") != _own_sha256(found):
            raise ValueError
        for entry in found["files"].values():
            entry["bytes"], entry["sha256"]
        return found
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{field}: {str(file)!r} is damaged") from None


def check_saved(directory: Path, field: str) -> dict[str, Any] | None:
    """The manifest, if there is one. Raises UserError naming the first file that is not as it was
    when the directory was saved; `field` of the config named it."""
    manifest = read_manifest(directory, field)
    if manifest is None:
        return None
    there, entries = set(_files(directory)), manifest["files"]
    for name, saved in entries.items():
        if name not in there:
            raise UserError(f"{field}: {str(directory / name)!r} is missing")
        # Before it is read: what a link leads to may have no end.
        if (now := (directory / name).stat().st_size) != saved["bytes"]:
            raise _changed(directory / name, field, f"it has {now} bytes, not {saved['bytes']}")
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda name: _measured(directory / name), entries)
        for (name, saved), now in zip(entries.items(), found, strict=True):
            if now != saved:
                raise _changed(directory / name, field, "its SHA-256 is another")
    return manifest


def _changed(file: Path, field: str, said: str) -> UserError:
    return UserError(f"{field}: {str(file)!r} is not what was saved: {said}")


def _own_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _measured(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return {"bytes": opened.tell(), "sha256": digest}


def _files(directory: Path) -> list[str]:
    """The files in a directory and below, but for manifests and the text for people, which changes
    when there is more to say."""
    found = (p for p in sorted(directory.rglob("*")) if p.name not in (MANIFEST, "README.md"))
    return [str(path.relative_to(directory)) for path in found if path.is_file()]
