"""How a process ends: with the one that started it, and by SIGTERM as by Ctrl-C."""

import fcntl
import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PARENT = "OPSD_PARENT"
"""Environment variable: the end of a pipe that a command is to watch with `end_with_parent`."""


def end_with_parent(watched: int) -> None:
    """Have the kernel end this process, however busy, when the other end of the pipe `watched`
    closes, as it does when the process that holds it ends, however that comes.

    Not PR_SET_PDEATHSIG: that follows the thread that started this process, which may end before.
    """
    fcntl.fcntl(watched, fcntl.F_SETOWN, os.getpid())
    if hasattr(fcntl, "F_SETSIG"):  # Linux; elsewhere SIGIO, which ends a process as well
        fcntl.fcntl(watched, fcntl.F_SETSIG, signal.SIGTERM)
    fcntl.fcntl(watched, fcntl.F_SETFL, fcntl.fcntl(watched, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([watched], [], [], 0)[0]:  # closed before we looked
        os._exit(1)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM leaves the block as Ctrl-C does, by an exception: what it has begun is put away."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return

    def leave(number: int, _) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
