"""Whether the Hugging Face hub can be reached, found out once and within seconds. Needs no torch.

Without a connection the hub's client asks six times over half a minute, once for a tokenizer and
again for its config, and writes a dozen lines. Told that it is offline it looks into its cache at
once.
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
    """Call before a model or a dataset is loaded by this name. If it is no local path and the hub
    does not answer, the hub's client is set to offline."""
    if os.path.exists(os.path.expanduser(name)) or constants.HF_HUB_OFFLINE or reachable():
        return
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:  # it has copied the setting
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


@cache
def reachable() -> bool:
    """Whether the hub can be connected to; assumed where there is a proxy."""
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

    # In a thread of its own, since no time limit holds for resolving the name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return answered.is_set()
