"""Published configs of well-known models, by name. It needs no torch."""

from pathlib import Path
from typing import Any

from opsd.common.errors import UserError
from opsd.common.files import read_toml
from opsd.common.hub_offline import cached, in_cache
from opsd.common.near import did_you_mean, near_file, near_hub
from opsd.common.strict_json import read_object
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


def known_window(section: ModelSection) -> int | None:
    """The model's window, in tokens; None if only transformers can find it. Raises UserError for a
    damaged config.json, and for a name that is no path, not in the hub's cache, and not known."""
    where, path = f"model.path is {section.path!r}", Path(section.path)
    if section.gguf_file is not None:
        return None
    if path.suffix == ".json" and not path.exists():
        raise UserError(f"{where}: there is no such file{near_file(path)}")
    here = path / "config.json" if path.is_dir() else path
    file = here if path.exists() else cached(section.path, section.revision, "config.json")
    if file is not None and file.is_file():
        config = read_object(file, f"{where}: not a model's config")
    elif path.exists() or in_cache(section.path, section.revision):  # an adapter
        return None
    else:
        config = known_config(section.path, where)
    text = config.get("text_config")
    found = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    own = "auto_map" in config  # the model's code says what its fields mean
    return found if type(found) is int and found > 0 and not own else None


def check_window(prompt: int, solution: int, rollout: int, window: int | None) -> None:
    """Raises UserError if a window is shorter than these numbers of tokens together."""
    longest = prompt + solution + rollout
    if window is not None and longest > window:
        room = window - prompt - rollout
        mend = f"--solution-tokens {room if room > 0 else window // 4}"
        if room < 1:
            mend += f" --prompt-tokens {window // 4} rollout.max_new_tokens={window // 2}"
        raise UserError(
            f"--prompt-tokens {prompt}, --solution-tokens {solution} and "
            f"rollout.max_new_tokens={rollout} are {longest} together: the model's window is "
            f"{window}; {mend} fits"
        )
