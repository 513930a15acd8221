"""Read the images of rows. They stay encoded until a model needs their pixels.

Images are untrusted: only PNG, JPEG and WebP are opened, an image's size is checked before its
pixels are read, URLs are not followed, and a path must stay inside the directory of its data file.
"""

import hashlib
import secrets
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_BYTES, MOST_PIXELS = 1 << 26, 1 << 25
"""Limits of an image, encoded and decoded: 32 Mi pixels take 100 MB."""

MARK = chr(0xF0000 + secrets.randbelow(0xFFFE))
"""Marks an image's place in a rendered template: one character of no alphabet, so that a template
cannot cut it, and random, so that no row is written with it."""


class UnreadableImageError(ValueError):
    """An image cannot be used; the message says why."""


@dataclass(frozen=True)
class RowImage:
    """An encoded image, or the path of its file. digest: a hash of the encoded bytes."""

    source: bytes | Path
    digest: str

    def pixels(self) -> Image.Image:
        """Decode to RGB, rotated as its EXIF data say. Raises UnreadableImageError."""
        data = _bytes(self.source)
        if _digest(data) != self.digest:
            raise UnreadableImageError(f"{str(self.source)!r} has changed since it was read first")
        try:
            with _opened(data) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        except UnreadableImageError:
            raise
        except Exception as error:  # whatever a damaged file provokes
            raise UnreadableImageError(f"is damaged ({error})") from None


def read_images(value: Any, base: Path | None) -> tuple[RowImage, ...]:
    """Read the images of a column's value: one, a list of them, or none.

    value: encoded bytes, datasets' {"bytes", "path"}, a Pillow image, or a path.
    base: the directory that paths are relative to and must stay in; None if the source has none.

    Raises UnreadableImageError for what is no image, or too large; decodes no pixels.
    """
    values = value if isinstance(value, list | tuple) else [value]
    images = []
    for number, one in enumerate(values, start=1):
        if one is None or (isinstance(one, str) and not one.strip()):
            continue
        try:
            images.append(_read(one, base))
        except UnreadableImageError as error:
            raise UnreadableImageError(f"image {number} {error}") from None
    return tuple(images)


def _read(value: Any, base: Path | None) -> RowImage:
    if isinstance(value, Image.Image):  # without loss
        file = BytesIO()
        plain = value.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")
        (value if plain else value.convert("RGB")).save(file, "PNG")
        value = file.getvalue()
    if isinstance(value, Mapping) and {"bytes", "path"} & value.keys():
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str | Path):
        value = _file(str(value), base)
    if not isinstance(value, bytes | Path):
        raise UnreadableImageError(
            f"is of type {type(value).__name__}: it may be bytes, a path, {{bytes, path}}, or "
            "an image of Pillow's"
        )
    data = _bytes(value)
    with _opened(data):
        return RowImage(value, _digest(data))


def _file(name: str, base: Path | None) -> Path:
    if "://" in name or name.startswith("data:"):
        said = "is an address, which is not followed: save it as a file"
        raise UnreadableImageError(f"{said} ({name[:60]!r})")
    if base is None:
        raise UnreadableImageError(
            f"is the path {name[:60]!r}, but its source is not a file on this machine"
        )
    try:
        path = (base / name).resolve()
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long a name, no name, links in a circle
        raise UnreadableImageError(f"is {name[:60]!r}, which leads to no file") from None
    if not path.is_relative_to(base.resolve()):
        raise UnreadableImageError(f"is {name[:60]!r}, outside of {str(base)!r}")
    if not is_file:
        raise UnreadableImageError(f"is {name[:60]!r}: no such file in {str(base)!r}")
    return path


def _bytes(source: bytes | Path) -> bytes:
    try:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if size > MOST_BYTES:
            raise UnreadableImageError(f"takes {size:,} bytes (at most {MOST_BYTES:,})")
        return source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise UnreadableImageError(f"cannot be read ({error})") from None


def _opened(data: bytes) -> Image.Image:
    """Open an image; reads only its header. Raises UnreadableImageError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes, which we limit ourselves
            image = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise UnreadableImageError(f"has too many pixels (at most {MOST_PIXELS:,})") from None
    except Exception:  # Pillow's own, of any kind
        raise UnreadableImageError(f"is not a {', '.join(FORMATS)} image") from None
    if image.width * image.height > MOST_PIXELS:
        size = f"{image.width} x {image.height}"
        raise UnreadableImageError(f"has {size} pixels (at most {MOST_PIXELS:,})")
    return image


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
