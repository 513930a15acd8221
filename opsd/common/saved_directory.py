"""Directories that are saved atomically and can be verified: checkpoints, models, caches.

Each has a manifest, written last, with the size and the SHA-256 of every file. A file that the
manifest does not list was not saved with the directory, and readers ignore it.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opsd.common.errors import UserError
from opsd.common.files import move, remove, sync, unfinished, write_file
from opsd.common.strict_json import read_text

MANIFEST = "manifest.json"
FORMAT = "opsd 1"  # tells our manifests from other software's
_READERS = 8  # files hashed in parallel


@contextmanager
def new_directory(path: Path, facts: dict[str, Any] | None = None) -> Iterator[Path]:
    """Yield a directory to fill. At the end it replaces `path`, with `facts` in its manifest; after
    an exception nothing is left of it."""
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
    """Write the manifest after all other files are on the disk."""

    def settle(name: str) -> dict[str, Any]:
        sync(directory / name)
        return _measured(directory / name)

    readable(directory)
    names = _files(directory)
    with ThreadPoolExecutor(_READERS) as pool:  # hash one file while the disk writes another
        entries = dict(zip(names, pool.map(settle, names), strict=True))
    for inner in (path for path in directory.rglob("*") if path.is_dir()):
        sync(inner)
    write_file(directory / MANIFEST, _sealed({"format": FORMAT, "files": entries, **facts}))


def readable(directory: Path) -> None:
    """Let those read the files who may read the directory: safetensors lets only the owner."""
    for name in _files(directory):
        (directory / name).chmod(directory.stat().st_mode & 0o666)


def read_manifest(directory: Path, field: str = "") -> dict[str, Any] | None:
    """The directory's manifest; None if it has none of ours. Raises UserError if it is damaged."""
    file = directory / MANIFEST
    if not file.is_file():
        return None
    try:
        found = json.loads(text := read_text(file))
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            return None
        del found["sha256"]
        if text != _sealed(found):  # a last digit may change without its number
            raise ValueError
        for entry in found["files"].values():
            entry["bytes"], entry["sha256"]
        return found
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{field}: {str(file)!r} is damaged") from None


def check_saved(directory: Path, field: str) -> dict[str, Any] | None:
    """Verify the directory; returns its manifest, None if it has none. Raises UserError that names
    the first file that changed since it was saved. field: the config field that names it."""
    manifest = read_manifest(directory, field)
    if manifest is None:
        return None
    there, entries = set(_files(directory)), manifest["files"]
    for name, saved in entries.items():
        if name not in there:
            raise UserError(f"{field}: {str(directory / name)!r} is missing")
        # Compare sizes before reading: a link may lead to an endless device.
        if (now := (directory / name).stat().st_size) != saved["bytes"]:
            raise _changed(directory / name, field, f"it has {now} bytes, not {saved['bytes']}")
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda name: _measured(directory / name), entries)
        for (name, saved), now in zip(entries.items(), found, strict=True):
            if now != saved:
                raise _changed(directory / name, field, "its SHA-256 differs")
    return manifest


def _changed(file: Path, field: str, said: str) -> UserError:
    return UserError(f"{field}: {str(file)!r} is not what was saved: {said}")


def _sealed(manifest: dict[str, Any]) -> str:
    """The manifest's text, with its own SHA-256 at the end."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps(manifest | {"sha256": digest}, indent=2, ensure_ascii=False) + "\n"


def _measured(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return {"bytes": opened.tell(), "sha256": digest}


def _files(directory: Path) -> list[str]:
    """All files below a directory except manifests and README.md, which may change after saving."""
    found = (p for p in sorted(directory.rglob("*")) if p.name not in (MANIFEST, "README.md"))
    return [str(path.relative_to(directory)) for path in found if path.is_file()]
