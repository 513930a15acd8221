"""Published configs of well-known models, by name. It needs no torch."""

from pathlib import Path
from typing import Any

from opsd.common.errors import UserError
from opsd.common.files import read_toml
from opsd.common.hub_offline import in_cache
from opsd.common.near import did_you_mean, near_file, near_hub
from opsd.config.sections import ModelSection

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")

KNOWN: dict[str, dict[str, Any]] = {
    name: family["common"] | dict(zip(_SIZES, model.pop("sizes"), strict=True)) | model
    for family in read_toml(__file__, "models").values()
    for name, model in family["models"].items()
}
"""Name → its config; -Instruct and -Base models have the same."""


def known_config(path: str, where: str) -> dict[str, Any]:
    """The config of a model by its name. Raises UserError for one that is not known."""
    name = path.rsplit("/", 1)[-1].lower()
    for suffix in ("-instruct", "-base", "-it"):
        name = name.removesuffix(suffix)
    if found := next((found for known, found in KNOWN.items() if known.lower() == name), None):
        return found
    hub = near_hub(path).partition("'")[2].rpartition("'")[0] or path
    known = f" ({', '.join(KNOWN)}); `hf download {hub} config.json` fetches it"
    raise UserError(
        f"{where}: neither a model directory nor a config.json nor in the hub's local cache, and "
        f"not one of those known here{did_you_mean(Path(path).name, KNOWN) or known}"
    )


def check_known(section: ModelSection) -> None:
    """Raises UserError for a name that is no path, not in the hub's cache, and not known."""
    where, path = f"model.path is {section.path!r}", Path(section.path)
    if path.exists() or section.gguf_file is not None:
        return
    if path.suffix == ".json":
        raise UserError(f"{where}: there is no such file{near_file(path)}")
    if not in_cache(section.path, section.revision):
        known_config(section.path, where)
