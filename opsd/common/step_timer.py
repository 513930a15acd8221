"""Measure the seconds and the peak memory of each phase of a training step.

The phases follow each other: rollout, grading, teacher, student, loss, backward, optimizer. Code
marks a phase by `with phase("teacher"):`, which costs nothing unless a StepTimer is active. On a
GPU the time is that between CUDA events, which are read only at the end of the step, so that
measuring adds no synchronisation inside it.
"""

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import psutil
import torch

from opsd.common.system import restart_peak

DOING = {"rollout": "sampling", "teacher": "scoring", "student": "forward"}
DOING |= {"loss": "computing the loss", "optimizer": "update"}
"""Phase → the name that the display shows for it, if it differs."""

INTERVAL = 0.02  # seconds between two readings of the process's memory


class StepTimer:
    """Collects the seconds and peak bytes of the current step's phases, on one device."""

    def __init__(self, device: torch.device):
        self.gpu = device.type == "cuda"
        self.watch = None if self.gpu else Watch()
        self.listener: Callable[[str], None] = lambda name: None  # called when a phase begins
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._open: tuple[str, object] | None = None
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self, name: str) -> None:
        """Begin a phase, and end the one before it."""
        self.end()
        if self.gpu:
            restart_peak()
        elif self.watch:
            self.watch.restart()
        self._open = name, self._now()
        self.listener(DOING.get(name, name))

    def end(self) -> None:
        """End the phase in progress, if there is one."""
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
        """End the step: return its `<phase>_seconds` and `<phase>_peak_bytes`, and start anew."""
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
    """Reads this process's memory 50 times a second. The system's own peak would have to be reset,
    which would spoil it for other users, such as `peak_memory`."""

    def __init__(self):
        self._lock = threading.Lock()  # a reading from before a restart must not count after it
        self._most = resident()
        self.thread = threading.Thread(target=_look, args=(weakref.ref(self),), daemon=True)
        self.thread.start()

    def restart(self) -> None:
        with self._lock:
            self._most = resident()

    def peak(self) -> int:
        """The most bytes seen since the last restart."""
        self.look()
        return self._most

    def look(self) -> None:
        with self._lock:
            self._most = max(self._most, resident())


def _look(watch: weakref.ref[Watch]) -> None:
    """Read the memory every INTERVAL seconds until the watch is garbage-collected."""
    while (alive := watch()) is not None:
        alive.look()
        del alive
        time.sleep(INTERVAL)


def resident() -> int:
    """This process's resident memory, in bytes."""
    return _process(os.getpid()).memory_info().rss


@cache  # keyed by process id, since a forked process inherits the cache
def _process(pid: int) -> psutil.Process:
    return psutil.Process(pid)


_measured: StepTimer | None = None


@contextmanager
def measured(timer: StepTimer | None) -> Iterator[None]:
    """Let `timer` measure the phases inside this context."""
    global _measured
    before, _measured = _measured, timer
    try:
        yield
    finally:
        _measured = before


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Mark a phase of the step; it is measured inside `measured(timer)` only."""
    timer = _measured
    if timer is None:
        yield
        return
    timer.begin(name)
    try:
        yield
    finally:
        timer.end()
