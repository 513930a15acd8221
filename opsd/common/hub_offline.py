"""Find out, once and within seconds, whether the Hugging Face hub can be reached. Needs no torch.

Without a connection the hub's client retries six times over half a minute, for the tokenizer and
again for the config, and logs a dozen lines. When set to offline it uses its cache at once.
"""

import contextlib
import os
import socket
import sys
import threading
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

SECONDS = 4.0
"""The time limit for resolving the hub's name and connecting to it."""


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
    address, answered = urlsplit(constants.ENDPOINT), threading.Event()
    port = address.port or (80 if address.scheme == "http" else 443)

    def ask() -> None:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((address.hostname, port), SECONDS),
        ):
            answered.set()

    # In a thread, since resolving the name has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return answered.is_set()
