"""How a process ends: together with its parent, or by Ctrl-C or SIGTERM, which act alike."""

import fcntl
import os
import select
import signal
import threading
from typing import Any

PARENT = "OPSD_PARENT"
"""Environment variable: the file descriptor of the pipe that `end_with_parent` watches."""


def end_with_parent(watched: int) -> None:
    """Have the kernel end this process, however busy, when the other end of the pipe `watched`
    closes. It closes when the parent, which holds it, ends in whatever way.

    Not PR_SET_PDEATHSIG: it watches the thread that started us, which may end before its process.
    """
    fcntl.fcntl(watched, fcntl.F_SETOWN, os.getpid())
    if hasattr(fcntl, "F_SETSIG"):  # Linux; elsewhere SIGIO, which ends a process as well
        fcntl.fcntl(watched, fcntl.F_SETSIG, signal.SIGTERM)
    fcntl.fcntl(watched, fcntl.F_SETFL, fcntl.fcntl(watched, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([watched], [], [], 0)[0]:  # closed before we looked
        os._exit(1)


class Stopped(KeyboardInterrupt):
    """Raised by Ctrl-C or SIGTERM, so that the interrupted code cleans up as after any exception.

    number: the signal's. The text, if there is one, says what was saved.
    """

    def __init__(self, number: int, *text: str):
        super().__init__(*text)
        self.number = number


class Interruption:
    """A context in which Ctrl-C and SIGTERM raise Stopped: at once, but between `hold` and
    `release` only at the release. A second Ctrl-C does not wait."""

    def __init__(self) -> None:
        self.signal: int | None = None  # the first signal received
        self._holding = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # other threads may not set them
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        # torch.save closes its file while Stopped passes, and then raises an error of its own.
        if isinstance(error, RuntimeError) and isinstance(error.__context__, Stopped):
            raise error.__context__ from None

    def _received(self, number: int, _) -> None:
        again, self.signal = self.signal is not None, self.signal or number
        if again and number == signal.SIGTERM:
            return  # the process is ending already
        if again or not self._holding:
            raise Stopped(number)

    def hold(self) -> None:
        """Delay a signal until `release`."""
        self._holding = True

    def release(self) -> None:
        """Raises Stopped if a signal came since `hold`."""
        self._holding = False
        if self.signal is not None:
            raise Stopped(self.signal)
