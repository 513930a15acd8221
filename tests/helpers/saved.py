"""Saved directories that are changed by somebody who knows how they are checked."""

from pathlib import Path

from opsd.common.saved_directory import MANIFEST, _seal, read_manifest


def sealed(directory: Path) -> Path:
    """Give the directory a manifest that agrees with its current files."""
    facts = {k: v for k, v in read_manifest(directory).items() if k not in ("format", "files")}
    (directory / MANIFEST).unlink()
    _seal(directory, facts)
    return directory
