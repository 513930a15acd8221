"""Find out, within seconds, whether the Hugging Face hub can be reached and has a model. Needs no
torch.

Without a connection the hub's client retries six times over half a minute, for the tokenizer and
again for the config, and logs a dozen lines. When set to offline it uses its cache at once.
"""

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

SECONDS = 4.0
"""The time limit for resolving the hub's name and connecting to it."""

NO_ANSWER = "the hub does not answer, and it is not in its cache: connect, or name a local copy"


def before_asking_hub(name: str) -> None:
    """Set the hub's client to offline if `name` is no local path and the hub does not answer. Call
    it before loading a model or a dataset by this name."""
    if os.path.exists(os.path.expanduser(name)) or constants.HF_HUB_OFFLINE or reachable():
        return
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:  # it has its own copy of the setting
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


@cache
def reachable() -> bool:
    """Whether the hub accepts a connection; taken for granted if there is a proxy."""
    if getproxies().keys() - {"no"}:  # NO_PROXY alone names no proxy
        return True
    address, answered = urlsplit(constants.ENDPOINT), list[bool]()
    port = address.port or (80 if address.scheme == "http" else 443)

    def ask() -> None:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((address.hostname, port), SECONDS),
        ):
            answered.append(True)

    _within(SECONDS, ask)
    return bool(answered)


def _within(seconds: float, ask: Callable[[], None]) -> None:
    """Runs `ask` in a thread, since resolving a name has no time limit of its own."""
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)


def in_cache(name: str, revision: str | None, kind: str = "model") -> bool:
    """Whether the hub's cache has a model's, or an adapter's, config; of a dataset, whether it or
    the cache of `datasets` may have it."""
    if kind == "dataset":
        owner, named, _ = name.partition("/")
        home = os.path.join(constants.HF_HOME, "datasets")
        prepared = Path(os.environ.get("HF_DATASETS_CACHE", home))
        kept = Path(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}")
        return kept.is_dir() or any(prepared.glob(f"{owner}___*" if named else f"{owner}*"))
    return any(cached(name, revision, file) for file in ("config.json", "adapter_config.json"))


def cached(name: str, revision: str | None, file: str) -> Path | None:
    """A model's file in the hub's cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):  # no name of the hub
        found = try_to_load_from_cache(name, file, None, revision)
        return Path(found) if isinstance(found, str) else None
    return None


def why_absent(name: str, revision: str | None, kind: str = "model") -> str:
    """Why no model, or dataset, of this name of the hub can be loaded, or "" if it may be: only
    what is certain, and takes the hub no more than a second to say."""
    if in_cache(name, revision, kind):
        return ""
    before_asking_hub(name)
    if constants.HF_HUB_OFFLINE:
        return NO_ANSWER
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    said = {"RevisionNotFoundError": f"the hub has no revision {revision!r} of it"}
    said["RepositoryNotFoundError"] = "the hub has no such one, or a private one: `hf auth login`"
    found = [""]  # gated, without this file, slow, whatever else: it may be there

    def ask() -> None:
        try:
            file = {"model": "config.json", "dataset": "README.md"}[kind]
            get_hf_file_metadata(hf_hub_url(name, file, repo_type=kind, revision=revision))
        except Exception as error:
            found.append(type(error).__name__)

    _within(1.0, ask)
    return said.get(found[-1], "")
