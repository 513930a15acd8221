"""Reads the headers of a model's safetensors files, and checks them before weights are loaded."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from opsd.common.errors import UserError, in_short
from opsd.common.strict_json import read_object
from opsd.models.multimodal import auto_class

LARGEST = 1e12  # weight: products of larger ones overflow, and a norm after them hides it
MOST_PACKED = 16  # parameters in one stored number, in quantised files

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its dtype in safetensors' notation, and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def find_file(
    path: str, name: str, revision: str | None = None, offline: bool = False
) -> Path | None:
    """Find a file in a model's directory or hub repository (offline: the hub's cache)."""
    try:
        if Path(path).exists():
            file = Path(path) / name
            return file if file.is_file() else None
        found = cached_file(path, name, revision=revision, local_files_only=offline)
        return Path(found) if found else None
    except (OSError, ValueError):  # no such file or repository, or an invalid name
        return None


def stored_tensors(path: str, revision: str | None = None, where: str = "") -> dict[str, Stored]:
    """The tensors of a model's weights, by name; {} where the weights are not in safetensors files.
    Raises UserError, which begins with `where`, for files that are damaged, missing or there twice.
    """
    index = find_file(path, SAFE_WEIGHTS_INDEX_NAME, revision)
    if index is None:
        file = find_file(path, SAFE_WEIGHTS_NAME, revision)
        return {} if file is None else header(file, where)
    places = read_object(index, where).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{where}: {str(index)!r} has no weight_map from tensors to files")
    if SAFE_WEIGHTS_NAME not in places.values() and (Path(path) / SAFE_WEIGHTS_NAME).exists():
        raise UserError(
            f"{where}: its weights are there twice, in {SAFE_WEIGHTS_NAME} and in the files of "
            f"{index.name}, and each program takes its own choice; remove one of the two"
        )
    found: dict[str, Stored] = {}
    for name in sorted(set(places.values())):
        if (file := find_file(path, name, revision)) is None:
            raise UserError(
                f"{where}: {name!r} is missing, which {index.name} names; download the model again"
            )
        found |= header(file, where)
    return found


def header(file: Path, where: str = "") -> dict[str, Stored]:
    """The tensors of one safetensors file, by name. Raises UserError, which begins with `where`."""
    try:
        with safe_open(file, framework="pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}
            return {n: Stored(file, s.get_dtype(), tuple(s.get_shape())) for n, s in parts.items()}
    except Exception as error:  # safetensors' own, of several kinds
        said = f"{str(file)!r} is no safetensors file: {in_short(error)}"
        raise UserError(f"{where}: it cannot be loaded ({said})") from None


def usual_dtype(tensors: dict[str, Stored]) -> torch.dtype | None:
    """The dtype of most of the numbers; None if they are not floats, as in a quantised model."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += prod(tensor.shape)
    return FLOATS.get(sizes.most_common(1)[0][0]) if sizes else None


def check_size(config: PreTrainedConfig, stored: Mapping[str, Stored], trust: bool) -> None:
    """Raise ValueError if the config's model is far larger than the files: transformers would make
    it and fill it with random numbers."""
    with torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=trust)
    asked, held = model.num_parameters(), sum(prod(tensor.shape) for tensor in stored.values())
    if asked > MOST_PACKED * held:
        raise ValueError(f"its config.json asks for {asked:,} numbers, its files hold {held:,}")


def check_all_used(model: PreTrainedModel, unused: Iterable[str], where: str) -> None:
    """Raise UserError for a stored tensor that the model does not use although it has the tensor's
    module or list of blocks. Other unused tensors are allowed, such as those of an image tower."""

    def parts(name: str) -> set[str]:
        """The tensor's module, and the list of blocks that contains it."""
        return {name.rpartition(".")[0], re.split(r"\.\d+\.", name)[0]}

    known = set().union(*map(parts, model.state_dict()))
    for name in sorted(unused):
        if parts(name) & known and not name.endswith("inv_freq"):  # old Llama files have it
            raise UserError(
                f"{where}: the model of its config.json has no place for {name} of its weights"
            )


def check_numbers(
    weights: Iterable[tuple[str, Tensor]], stored: Mapping[str, Stored], where: str, path: str
) -> None:
    """Raise UserError for weights that are stored as integers (`stored`), not finite in their
    dtype, or all too small for it. One pass takes 0.1 s a GB. path: the file to name for a weight
    that is not in `stored`."""
    for name, weight in weights:
        if not weight.is_floating_point() or not weight.numel():
            continue
        file, kind = (stored[name].file, stored[name].dtype) if name in stored else (path, "")
        if kind[:1] in ("I", "U") or kind == "BOOL":
            said = f"{name} in {str(file)!r} has whole numbers ({kind}) for its weights"
            raise UserError(f"{where}: {said}")
        low, high = (x.item() for x in torch.aminmax(weight.detach()))
        if not max(-low, high) < LARGEST:
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
