"""Runs requests in threads that end with the process, even if they have no answer yet."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import TypeVar

Result = TypeVar("Result")


def as_done(
    work: Callable[[int, Event], Result], count: int, workers: int
) -> Iterator[tuple[int, Result]]:
    """Yield (i, work(i, stopped)) for i < count, in the order in which they are done.

    The first exception is raised here. Then no further work begins, and `stopped` is set for work
    in progress. The threads are daemons, unlike those of concurrent.futures, so that neither Ctrl-C
    nor an error waits for an answer that takes half an hour.
    """
    todo, lock, stopped = iter(range(count)), Lock(), Event()
    done: SimpleQueue[tuple[int, Result | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        while not stopped.is_set():
            with lock:
                i = next(todo, None)
            if i is None:
                return
            try:
                done.put((i, work(i, stopped), None))
            except BaseException as error:
                done.put((i, None, error))
                return

    for _ in range(min(workers, count)):
        Thread(target=run, daemon=True).start()
    try:
        for _ in range(count):
            i, result, error = done.get()
            if error is not None:
                raise error
            yield i, result
    finally:
        stopped.set()


def in_background(work: Callable[[Future[Result]], Result]) -> Future[Result]:
    """Run `work` in a thread; the future has its result or exception. `work` gets the future, and
    should end early if that is cancelled."""
    future: Future[Result] = Future()

    def run() -> None:
        with suppress(InvalidStateError):  # it was cancelled
            try:
                future.set_result(work(future))
            except BaseException as error:
                future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future
