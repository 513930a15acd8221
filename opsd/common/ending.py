"""How a process ends: with the one that started it, by Ctrl-C, and by SIGTERM as by Ctrl-C."""

import fcntl
import os
import select
import signal
import threading
from typing import Any

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


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM. What it interrupts cleans up, as after any exception.

    number: the signal's. The text, where there is one, says what was saved.
    """

    def __init__(self, number: int, *text: str):
        super().__init__(*text)
        self.number = number


class Interruption:
    """A context in which Ctrl-C and SIGTERM raise Stopped: at once, or between `hold` and `release`
    at the release. A second Ctrl-C does not wait."""

    def __init__(self) -> None:
        self.signal: int | None = None  # the first that came
        self._holding = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _received(self, number: int, _) -> None:
        again, self.signal = self.signal is not None, self.signal or number
        if again and number == signal.SIGTERM:
            return  # the process is ending already
        if again or not self._holding:
            raise Stopped(number)

    def hold(self) -> None:
        """From here on a signal waits."""
        self._holding = True

    def release(self) -> None:
        """Raises Stopped if a signal came since `hold`."""
        self._holding = False
        if self.signal is not None:
            raise Stopped(self.signal)
