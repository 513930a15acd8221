"""The worker's side of `workers`: answers jobs within limits, and ends with its parent.

A message is its length in eight bytes, in replies a status byte, and a body. Imports no torch.
"""

import contextlib
import gc
import os
import resource
import signal
import sys
from importlib import import_module
from pathlib import Path

from opsd.common.ending import end_with_parent

LENGTH = 8  # bytes of a message's length
DONE, NO_MEMORY, NO_START = b"+", b"m", b"!"


def write_message(pipe: int, *parts: bytes | memoryview) -> None:
    """Writes a message made of these parts, without joining them in memory."""
    rest: list[bytes | memoryview] = [sum(map(len, parts)).to_bytes(LENGTH), *parts]
    while rest:
        written = os.writev(pipe, rest)
        while rest and written >= len(rest[0]):
            written -= len(rest.pop(0))
        rest[:1] = [memoryview(part)[written:] for part in rest[:1]]


def main() -> None:
    """Answers jobs until stdin ends, by the function that `make` of the module argv[1] returns.

    The kernel kills the process if a job takes more than `seconds` of CPU time (on a busy machine a
    job may wait for its turn), by the signal's default action: a Python handler cannot interrupt a
    computation in C. After a job that runs out of memory the process ends: the next needs a clean
    one."""
    module, seconds, memory, watched, *arguments = sys.argv[1:]
    end_with_parent(int(watched))
    # Keep whatever libraries print out of our messages.
    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def send(status: bytes, body: bytes = b"") -> None:
        write_message(replies, status, body)

    try:
        answer = import_module(module).make(*arguments)
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit of memory
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + int(memory)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
    except Exception as error:
        send(NO_START, f"{type(error).__name__}: {error}".encode())
        return
    gc.freeze()  # spare each collection from scanning what was imported
    send(DONE)
    while header := sys.stdin.buffer.read(LENGTH):
        try:
            job = sys.stdin.buffer.read(int.from_bytes(header))
            signal.setitimer(signal.ITIMER_PROF, float(seconds))
            made = answer(job)
            signal.setitimer(signal.ITIMER_PROF, 0)
            send(DONE, made)
        except MemoryError:
            send(NO_MEMORY)
            return
