"""Times the phases of a training step: the seconds and the peak memory of each.

The phases follow each other: rollout, grading, teacher, student, loss, backward, optimizer. Code
marks one by `with phase("teacher"):`, which costs nothing where nobody measures. On a GPU time is
taken between events on its stream, which are read when the step is over: measuring makes nobody
wait.
"""

import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from opsd.common.system import restart_peak

STATM = Path("/proc/self/statm")
INTERVAL = 0.02  # seconds between two looks at a CPU's memory


class StepTimer:
    """The parts of the step in progress, on one device."""

    def __init__(self, device: torch.device):
        self.gpu = device.type == "cuda"
        self.watch = None if self.gpu or not STATM.exists() else Watch()
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._open: tuple[str, object] | None = None
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self, name: str) -> None:
        """This part begins, and what was before it ends."""
        self.end()
        if self.gpu:
            restart_peak()
        elif self.watch:
            self.watch.restart()
        self._open = name, self._now()

    def end(self) -> None:
        """The part that has begun, if one has, is over."""
        if self._open is None:
            return
        (name, begun), ended = self._open, self._now()
        self._open = None
        if self.gpu:
            self._events.append((name, begun, ended))
            peak = torch.cuda.max_memory_allocated()
        else:
            self.seconds[name] = self.seconds.get(name, 0.0) + ended - begun
            peak = self.watch.peak() if self.watch else 0
        self.peaks[name] = max(self.peaks.get(name, 0), peak)

    def take(self) -> dict[str, float]:
        """`<part>_seconds` and `<part>_peak_bytes` of the step, which is over; the next begins."""
        self.end()
        if self._events:
            self._events[-1][2].synchronize()
        for name, begun, ended in self._events:
            self.seconds[name] = self.seconds.get(name, 0.0) + begun.elapsed_time(ended) / 1000
        found = {f"{name}_seconds": seconds for name, seconds in self.seconds.items()}
        found |= {f"{name}_peak_bytes": peak for name, peak in self.peaks.items() if peak}
        self.seconds, self.peaks, self._events = {}, {}, []
        return found

    def _now(self):
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Watch:
    """Looks at this process's memory 50 times a second: the system's own peak cannot be restarted
    without spoiling it for others."""

    def __init__(self):
        self._lock = threading.Lock()  # or a look begun before a restart would undo it
        self._most = resident()
        self.thread = threading.Thread(target=_look, args=(weakref.ref(self),), daemon=True)
        self.thread.start()

    def restart(self) -> None:
        """Forget what was before."""
        with self._lock:
            self._most = resident()

    def peak(self) -> int:
        """The most bytes seen since."""
        self.look()
        return self._most

    def look(self) -> None:
        """Look now."""
        with self._lock:
            self._most = max(self._most, resident())


def _look(watch: weakref.ref[Watch]) -> None:
    """Until nobody needs the watch any more."""
    while (alive := watch()) is not None:
        alive.look()
        del alive
        time.sleep(INTERVAL)


def resident() -> int:
    """The memory that this process holds, in bytes. Linux."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


_measured: StepTimer | None = None


@contextmanager
def measured(parts: StepTimer | None) -> Iterator[None]:
    """What `part` names inside is counted there."""
    global _measured
    before, _measured = _measured, parts
    try:
        yield
    finally:
        _measured = before


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A part of the step that is measured, if one is."""
    parts = _measured
    if parts is None:
        yield
        return
    parts.begin(name)
    try:
        yield
    finally:
        parts.end()
