"""What a model's safetensors files say of their tensors in their headers, before any is read."""

import json
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its dtype by safetensors' name, and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def find_file(path: str, name: str, revision: str | None = None) -> Path | None:
    """The file of a model's directory, or of a hub repository; None where it has none."""
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    found = cached_file(
        path,
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def stored_tensors(path: str, revision: str | None = None) -> dict[str, Stored]:
    """The tensors of a model's weights by their names there; {} where they are no safetensors."""
    if (index := find_file(path, SAFE_WEIGHTS_INDEX_NAME, revision)) is not None:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [SAFE_WEIGHTS_NAME]
    files = [find_file(path, name, revision) for name in names]
    return {name: t for file in files if file is not None for name, t in header(file).items()}


def header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        told = json.loads(opened.read(min(size, 100_000_000)))  # safetensors' own limit
    return {
        name: Stored(file, one["dtype"], tuple(one["shape"]))
        for name, one in told.items()
        if name != "__metadata__"
    }


def usual_dtype(tensors: dict[str, Stored]) -> torch.dtype | None:
    """The dtype of most of the numbers; None where they are not floats, as in a quantised model."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += prod(tensor.shape)
    return FLOATS.get(sizes.most_common(1)[0][0]) if sizes else None
