"""What a model's safetensors files say of their tensors in their headers, before any is read."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)

from opsd.common.errors import UserError

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


def find_file(
    path: str, name: str, revision: str | None = None, offline: bool = False
) -> Path | None:
    """The file of a model's directory, or of a hub repository; None where it has none.

    offline: of what is in the hub's cache alone.
    """
    if Path(path).exists():
        file = Path(path) / name
        return file if file.is_file() else None
    try:
        found = cached_file(
            path,
            name,
            revision=revision,
            local_files_only=offline,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # no such repository, or no name of one
        return None
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


def check_numbers(
    weights: Iterable[tuple[str, Tensor]], stored: Mapping[str, Stored], where: str, path: str
) -> None:
    """Raises UserError for weights that are not finite in the dtype that they were loaded in, or
    were so small in fp64 that nothing is left of them. One pass over them: .1 s a GB on one core.

    stored: the same weights in their files. path: what to name where a weight is not found there.
    """
    for name, weight in weights:
        if not weight.is_floating_point() or not weight.numel():
            continue
        file = stored[name].file if name in stored else path
        low, high = (x.item() for x in torch.aminmax(weight.detach()))
        if not (isfinite(low) and isfinite(high)):
            raise UserError(
                f"{where}: {name} in {str(file)!r} has numbers that are NaN, infinite or too large "
                f"for {str(weight.dtype).removeprefix('torch.')}; the file is damaged"
            )
        if low == high == 0 and name in stored and stored[name].dtype == "F64":
            with safe_open(file, framework="pt") as opened:
                if opened.get_tensor(name).any():
                    raise UserError(
                        f"{where}: all of {name} in {str(file)!r} is too small for "
                        f"{str(weight.dtype).removeprefix('torch.')}; the file is damaged"
                    )
