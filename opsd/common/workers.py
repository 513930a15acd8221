"""Run work on untrusted input in processes with limits on CPU time and memory.

The kernel enforces the limits, since a process cannot reliably limit itself; a job that exceeds
them ends its worker, which is replaced. Workers start when first needed. Imports no torch.

The pool is our own because those of concurrent.futures, multiprocessing and pebble start their
workers by importing the caller's main module again: a script without a main guard then fails, and a
worker that holds the caller's torch exceeds its memory limit. Their time limits count wall-clock
time, by which harmless jobs fail on a busy machine.

SECURITY.md says which limits hold on macOS and Windows.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from opsd.common.errors import UserError
from opsd.common.worker_process import DONE, LENGTH, NO_MEMORY, write_message

_START_SECONDS = 120.0  # importing sympy from a cold disk on a busy machine
_PATIENCE = 30.0, 6.0  # kill a worker after 30 wall-clock seconds + 6 per second of CPU limit
LONGEST_REPLY = 1 << 31  # bytes
_PIPE = 1 << 20  # bytes of a pipe's buffer: the larger, the fewer reads and writes per message

# One thread. glibc keeps freed memory for the next job: mapping it again takes 4 µs a page.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_ENVIRONMENT |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 26)}

# Import the parent's opsd, but nothing else from its directory, which could shadow other modules.
_MAIN = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); "
    "from opsd.common.worker_process import main; sys.path.pop(0); main()"
)


@dataclass(frozen=True)
class Ended:
    """A job without an answer; why: "time" or "memory" ran out, or its worker was "killed"."""

    why: str


class _Worker:
    """One process, which answers one job at a time."""

    def __init__(self, module: str, seconds: float, memory: int, arguments: Sequence[str]):
        watched, self._watch = os.pipe()
        # -P: import nothing from the working directory. start_new_session: Ctrl-C in the terminal
        # reaches only the parent, which then kills its workers.
        limits = [str(seconds), str(memory), str(watched)]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _MAIN, module, *limits, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, **_ENVIRONMENT},
            start_new_session=True,
            pass_fds=[watched],
        )
        os.close(watched)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(AttributeError, OSError):  # not Linux, or above its limit
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE)
        self._news = select.poll()
        self._news.register(self.process.stdout, select.POLLIN)

    def give(self, job: bytes | memoryview) -> None:
        """Sends a job. Raises BrokenPipeError if the process has ended."""
        write_message(self.process.stdin.fileno(), job)

    def receive(self, patience: float) -> tuple[bytes, bytes] | Ended:
        """Returns the next reply's status and body; Ended if none comes in `patience` seconds."""
        deadline = time.monotonic() + patience
        try:
            header = self._read(LENGTH + 1, deadline)
            size = int.from_bytes(header[:LENGTH]) - 1
            if not 0 <= size <= LONGEST_REPLY:  # the worker is broken
                return Ended("killed")
            body = self._read(size, deadline)
        except TimeoutError:
            return Ended("time")
        except EOFError:  # it ended; SIGPROF: by its CPU time limit
            return Ended("time" if self.process.wait() == -signal.SIGPROF else "killed")
        status = header[LENGTH:]
        return Ended("memory") if status == NO_MEMORY else (status, body)

    def _read(self, size: int, deadline: float) -> bytes:
        parts = []
        while size:
            if not self._news.poll(1000 * max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            if not (part := os.read(self.process.stdout.fileno(), min(size, _PIPE))):
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        os.close(self._watch)


def _kill_all(pool: list[_Worker]) -> None:
    while pool:
        pool.pop().kill()


class Workers:
    """A pool of processes that answer jobs.

    module: its `make(*arguments)` returns the function that answers a job, bytes → bytes. seconds:
    CPU time per job. memory: bytes per process on top of those at its start. most: processes at
    most. Any thread may use it. Workers start when first needed, are replaced when they die, and
    end with `close()`, with the object, or with this process, in whatever way it ends.
    """

    def __init__(
        self, module: str, *arguments: str, seconds: float, memory: int, most: int = 1
    ) -> None:
        self._made_by = module, seconds, memory, arguments
        self.most = most
        self.patience = _PATIENCE[0] + _PATIENCE[1] * seconds
        self.pool: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _kill_all, self.pool)  # also runs at exit
        os.register_at_fork(after_in_child=self.pool.clear)  # the workers belong to the parent

    def close(self) -> None:
        """Ends the workers. If the pool is used again, it starts new ones."""
        _kill_all(self.pool)

    def answers(self, jobs: Sequence[bytes | memoryview]) -> list[bytes | Ended]:
        """The answers to the jobs, in order, by workers in parallel; UserError if none starts."""
        with self._lock:
            self._idle = [one for one in self.pool if one.process.poll() is None]
            for died in set(self.pool) - set(self._idle):  # while idle, so no job failed
                self._discard(died)
            threads = None if len(jobs) == 1 else ThreadPoolExecutor(self.most)
            try:
                return list((threads.map if threads else map)(self._answer, jobs))
            except BaseException:  # Ctrl-C: do not wait, and leave no reply to the next job
                for worker in list(self.pool):
                    worker.process.kill()
                if threads:
                    threads.shutdown(cancel_futures=True)
                self.close()
                raise
            finally:
                if threads:
                    threads.shutdown()

    def _answer(self, job: bytes | memoryview) -> bytes | Ended:
        worker = self._idle.pop() if self._idle else self._started()
        try:
            worker.give(job)
            reply = worker.receive(self.patience)
        except BrokenPipeError:
            reply = Ended("killed")
        if isinstance(reply, Ended):
            self._discard(worker)
            return reply
        self._idle.append(worker)
        return reply[1]

    def _started(self) -> _Worker:
        for _ in range(3):  # something else may kill one or two
            worker = _Worker(*self._made_by)
            self.pool.append(worker)
            reply = worker.receive(_START_SECONDS)
            if not isinstance(reply, Ended) and reply[0] == DONE:
                return worker
            self._discard(worker)
        said = reply.why if isinstance(reply, Ended) else reply[1].decode(errors="replace")
        raise UserError(f"{self._made_by[0]} does not start in a process of its own ({said})")

    def _discard(self, worker: _Worker) -> None:
        self.pool.remove(worker)
        worker.kill()
