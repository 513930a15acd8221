"""Where the quickstart keeps what can be made again: its download and its tiny bases."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """`$OPSD_CACHE`, or `~/.cache/opsd`."""
    return Path(os.environ.get("OPSD_CACHE") or Path.home() / ".cache" / "opsd").expanduser()


def tiny_base(seed: int, digest: str, cache: Path | None = None) -> Path:
    """The directory of the tiny base with this seed and recipe."""
    return (cache or cache_directory()) / f"tiny-{seed}-{digest}"


def tiny_bases() -> list[Path]:
    """The tiny bases that there are."""
    return sorted(cache_directory().glob("tiny-*"))
