"""The quickstart's cache: the downloaded model and the trained tiny bases."""

import os
from pathlib import Path

from opsd.common.errors import UserError


def cache_directory() -> Path:
    """`$OPSD_CACHE`, or `~/.cache/opsd`. Raises UserError if there is no home directory."""
    place = os.path.expanduser(os.environ.get("OPSD_CACHE") or "~/.cache/opsd")
    if place.startswith("~"):
        raise UserError(
            f"OPSD_CACHE: there is no home directory for {place!r}; set it to a directory"
        )
    return Path(place)


def tiny_base(seed: int, digest: str, cache: Path | None = None) -> Path:
    """The directory of the tiny base with this seed and this digest of its recipe."""
    return (cache or cache_directory()) / f"tiny-{seed}-{digest}"


def tiny_bases() -> list[Path]:
    """The directories of the tiny bases in the cache."""
    return sorted(cache_directory().glob("tiny-*"))
