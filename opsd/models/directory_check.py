"""Checks a model's directory before a library reads it, which might ignore what is wrong."""

from pathlib import Path
from typing import TYPE_CHECKING

from opsd.common.errors import UserError
from opsd.common.files import other_kind
from opsd.common.strict_json import MOST_BYTES, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TEXTS = (".json", ".jinja", ".model", ".txt")
READ = (*TEXTS, ".safetensors")
OBJECTS = "generation_config tokenizer_config special_tokens_map added_tokens".split()
MOST_LAYERS = 10_000
WINDOWS = ("sliding_window", "attention_chunk_size")  # a wrong one would fail only while sampling

EXPERTS = (None, "eager", "batched_mm", "grouped_mm")  # transformers has others from the hub


def check_kernels(config: "PreTrainedConfig", where: str) -> None:
    """Raise UserError, which begins with `where`, if the config names a kernel on the hub: that is
    code, which transformers would load and run. Leave the choice of the attention to us."""
    parts = [config]
    for part in parts:
        parts += filter(None, (getattr(part, name, None) for name in part.sub_configs))
        attention, experts = part._attn_implementation, part._experts_implementation
        if "/" in str(attention) or experts not in EXPERTS:
            named = f"attn_implementation {attention!r}, experts_implementation {experts!r}"
            raise UserError(
                f"{where}: its config.json has {named}: a kernel from the hub is code, and not run"
            )
    config._attn_implementation = None


def check_files(directory: Path, where: str) -> None:
    """Raise UserError, which begins with `where`, for what libraries would ignore (links that lead
    nowhere, directories, a key twice) and for more text or layers than can be read in time."""
    if not directory.is_dir():
        return
    for file in sorted(directory.iterdir()):
        if file.suffix in READ and not file.is_file():
            what = "a directory" if file.is_dir() else "a pipe or a device"
            what = what if file.exists() else "a link that leads nowhere"
            raise UserError(f"{where}: {str(file)!r} is {what}, and must be a file")
        if file.suffix in READ and (said := other_kind(file)):
            raise UserError(f"{where}: {str(file)!r} is {said}")
        if file.suffix in TEXTS and (size := file.stat().st_size) > MOST_BYTES:
            said = f"is too large: it has {size:,} bytes, at most {MOST_BYTES:,} are read"
            raise UserError(f"{where}: {str(file)!r} {said}")
    for file in (directory / f"{name}.json" for name in OBJECTS):
        if file.is_file():
            read_object(file, where)
    if (directory / "config.json").is_file():
        config = read_object(directory / "config.json", f"{where}: not a model's config")
        for part in (config, *(inside for inside in config.values() if isinstance(inside, dict))):
            for name, value in part.items():
                if "layers" in name and isinstance(value, int) and value > MOST_LAYERS:
                    said = f"{name} is {value}, and may be {MOST_LAYERS:,} at most"
                    raise UserError(f"{where}: not a model's config: {said}")
                if name in WINDOWS and not isinstance(value, int | None):
                    said = f"{name} is {value!r}, and must be a whole number"
                    raise UserError(f"{where}: not a model's config: {said}")
