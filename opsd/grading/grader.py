"""Is a completion's answer right?

The answer is what the completion's last `\\boxed{…}` holds. Equal strings, plain numbers and words
decide at once, here; everything else is compared (`answers`) in a worker process. math-verify's own
time limit needs the main thread, fails silently elsewhere and cannot interrupt one long computation
(`9^{9^{9^9}}`), so the limit here is a kill: a hostile answer costs one worker and scores 0 with a
reason. Imports no torch, starts nothing until it must.

The pool is our own because those of concurrent.futures, multiprocessing and pebble start their
workers by importing the caller's main module again: a script without a main guard then fails, and a
worker that holds the caller's torch exceeds its memory limit. Their time limits count wall-clock
time, by which honest answers fail on a busy machine.
"""

from __future__ import annotations

import json
import math
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opsd.common.errors import UserError
from opsd.data.boxed import last_boxed
from opsd.data.references import unreadable
from opsd.grading.answers.bounds import MOST_CHARACTERS as MAX_ANSWER_CHARACTERS
from opsd.grading.answers.bounds import too_large
from opsd.grading.answers.numbers import number, same_number
from opsd.grading.answers.words import canonical, is_phrase

_WORKER = Path(__file__).with_name("worker.py")
_START_SECONDS = 120.0  # importing sympy from a cold disk on a busy machine

_PATIENCE = 6.0  # wall-clock seconds for one of CPU time, before a worker is killed from here

_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\s*\{([^{}]*)\}")


@dataclass(frozen=True)
class Grade:
    """`extracted`: the content of the last box, None without one; `reason`: why, for people;
    `failed`: there was no verdict (time, memory, size), which scores 0."""

    correct: bool
    reason: str
    extracted: str | None
    failed: bool = False


def _plain(answer: str) -> str:
    """Without what is no part of an answer: dollars, spacing commands, `\\text{}`, a final stop."""
    answer = answer.replace("\\,", " ").replace("\\!", "").replace("{,}", ",").replace("\\$", "")
    answer = answer.replace("\N{MINUS SIGN}", "-")
    answer = _TEXT_COMMAND.sub(r"\1", answer)
    answer = answer.strip("$ \n\t").rstrip("\\")
    if answer.endswith(".") and not answer.endswith(".."):
        answer = answer[:-1]
    return " ".join(answer.split())


_SPACE = re.compile(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])")
_SIZE = re.compile(r"\\(?:left|right)(?![A-Za-z])|(?<=\\)[dt](?=frac(?![A-Za-z]))")


def _squeezed(answer: str) -> str:
    """Without what changes only the looks: `\\left( 1, \\dfrac12 \\right)` → `(1,\\frac12)`. Spaces
    between letters or digits stay: `1 1/2` is not `11/2`."""
    return _SPACE.sub("", _SIZE.sub("", answer))


def _grade_here(extracted: str, answer: str) -> Grade | None:
    """The cheap cases; None where math-verify has to decide."""
    given, wanted = _plain(extracted), _plain(answer)
    if extracted == answer.strip() or given == wanted != "":
        return Grade(True, "the same text", extracted)
    if given == "":
        return Grade(False, "the box is empty", extracted)
    for text, whose in ((extracted, "answer"), (answer, "reference")):
        if len(text) > MAX_ANSWER_CHARACTERS:
            reason = f"the {whose} is longer than {MAX_ANSWER_CHARACTERS} characters"
            return Grade(False, reason, extracted, failed=True)
    if _squeezed(given) == _squeezed(wanted):
        return Grade(True, "the same text", extracted)
    if problem := unreadable(answer):
        return Grade(False, f"the reference {problem}", extracted, failed=True)
    numbers = number(given), number(wanted)
    if numbers[0] is not None and numbers[1] is not None:
        equal = same_number(*numbers)
        return Grade(equal, "equal numbers" if equal else "different numbers", extracted)
    if too_large(given) or too_large(wanted):
        return Grade(False, "a number too large to compare", extracted, failed=True)
    if is_phrase(given) and is_phrase(wanted) and len(given) > 1 and len(wanted) > 1:
        # math-verify reads words as products of letters: to it `listen` equals `silent`.
        equal = canonical(given) == canonical(wanted)
        several = {"and", "or"} & {*given.casefold().split(), *wanted.casefold().split()}
        if equal or (not several and "," not in given + wanted):
            return Grade(equal, "the same words" if equal else "different words", extracted)
    return None


class _Worker:
    """One process and its job: None while it starts or waits. `deadline`: monotonic seconds."""

    def __init__(self, memory_limit: int, timeout: float, strict: bool):
        # A session of its own: Ctrl-C in the terminal is for the parent, which then kills its
        # workers in order.
        self.process = subprocess.Popen(
            [sys.executable, str(_WORKER), str(memory_limit), str(timeout)] + ["strict"] * strict,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        self.ready = False
        self.job: tuple[str, str] | None = None
        self.deadline = time.monotonic() + _START_SECONDS
        self._received = b""

    def give(self, job: tuple[str, str], timeout: float) -> None:
        """Raises BrokenPipeError if the process is gone."""
        completion, answer = job
        line = memoryview(json.dumps({"answer": answer, "completion": completion}).encode() + b"\n")
        while line:
            line = line[self.process.stdin.write(line) :]
        self.job, self.deadline = job, time.monotonic() + _PATIENCE * timeout

    def receive(self) -> dict | None:
        """The next reply, None while it is incomplete. Raises EOFError if the process ended."""
        chunk = self.process.stdout.read(65536)
        if not chunk:
            raise EOFError
        self._received += chunk
        if not self._received.endswith(b"\n"):
            return None
        reply, self._received = json.loads(self._received), b""
        return reply

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()


class Grader:
    r"""Grades completions against reference answers; a context manager that owns its workers.

    timeout: seconds of CPU time for one answer (on a busy machine it may wait six times as long);
    workers: processes at most; memory_limit: bytes of address space of each; strict: as
    `loss.reward.strict` (opsd.grading.answers.strict). May be called from any
    thread, one call at a time. Workers start when first needed, are replaced when they die, and end
    with `close()`, with the object, or with this process. Raises UserError for numbers that cannot
    be. How answers are compared: docs/evaluate.md.

    >>> with Grader() as grader:
    ...     grades = grader.grade([r"So \boxed{1,024}.", "1024"], ["1024", "1024"])
    >>> [(grade.correct, grade.reason) for grade in grades]
    [(True, 'equal numbers'), (False, 'no \\boxed answer')]
    """

    def __init__(
        self,
        *,
        timeout: float = 5.0,
        workers: int = 1,
        memory_limit: int = 2 << 30,
        strict: bool = True,
    ):
        if not 0 < timeout < math.inf:
            raise UserError(f"timeout: {timeout!r} is not a positive, finite number of seconds")
        if workers < 1:
            raise UserError(f"workers: {workers!r} is not a positive number of processes")
        if memory_limit < 256 << 20:
            raise UserError(
                f"memory_limit: {memory_limit!r} is below 256 MiB, which a worker needs"
            )
        self.timeout, self.workers, self.memory_limit = timeout, workers, memory_limit
        self.strict = strict
        self._pool: list[_Worker] = []
        self._failed_starts = 0  # in a row
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _kill_all, self._pool)  # also runs at exit

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_exception) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers. The grader can be used again; it then starts new ones."""
        _kill_all(self._pool)

    def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[Grade]:
        """One Grade for each completion, in order. Equal pairs are judged once.

        Raises ValueError if the lengths differ or an answer is empty, UserError if math-verify
        cannot be started.
        """
        if len(completions) != len(answers):
            raise ValueError(f"{len(completions)} completions for {len(answers)} answers")
        grades: list[Grade | None] = []
        hard: dict[tuple[str, str], list[int]] = {}  # (extracted, answer) → where it occurs
        for index, (completion, answer) in enumerate(zip(completions, answers, strict=True)):
            if not answer.strip():
                raise ValueError(f"answers[{index}] is empty")
            extracted = last_boxed(completion)
            if extracted is None:
                grades.append(Grade(False, "no \\boxed answer", None))
                continue
            grade = _grade_here(extracted, answer)
            if grade is None:
                hard.setdefault((extracted, answer), []).append(index)
            grades.append(grade)
        if hard:
            with self._lock:
                verdicts = self._judge(list(hard))
            for job, indices in hard.items():
                for index in indices:
                    correct, reason, failed = verdicts[job]
                    grades[index] = Grade(correct, reason, job[0], failed)
        return grades

    def _judge(self, jobs: list[tuple[str, str]]) -> dict[tuple[str, str], tuple[bool, str, bool]]:
        """job → (correct, reason, failed), the workers busy side by side."""
        waiting = deque(jobs)
        verdicts: dict[tuple[str, str], tuple[bool, str, bool]] = {}
        try:
            while len(verdicts) < len(jobs):
                self._assign(waiting, busy_or_waiting=len(jobs) - len(verdicts))
                for worker, readable in self._wait():
                    self._collect(worker, readable, verdicts)
        except (
            BaseException
        ):  # Ctrl-C too: a worker with an unread reply would answer the next question with it
            self.close()
            raise
        return verdicts

    def _assign(self, waiting: deque, busy_or_waiting: int) -> None:
        for worker in [
            w for w in self._pool if w.process.poll() is not None and w.job is None and w.ready
        ]:
            self._discard(worker)  # died while idle: nobody's fault
        while len(self._pool) < min(self.workers, busy_or_waiting):
            self._pool.append(_Worker(self.memory_limit, self.timeout, self.strict))
        for worker in self._pool:
            if waiting and worker.ready and worker.job is None:
                try:
                    worker.give(waiting[0], self.timeout)
                except BrokenPipeError:
                    continue  # died just now: replaced in the next round
                waiting.popleft()

    def _wait(self) -> list[tuple[_Worker, bool]]:
        """Waits for news: workers that wrote or ended (True) or are past their deadline (False)."""
        active = [worker for worker in self._pool if worker.job is not None or not worker.ready]
        if not active:
            return []
        with selectors.DefaultSelector() as selector:
            for worker in active:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            patience = min(worker.deadline for worker in active) - time.monotonic()
            readable = [key.data for key, _ in selector.select(max(0.0, patience))]
        now = time.monotonic()
        late = [worker for worker in active if worker not in readable and worker.deadline <= now]
        return [(worker, True) for worker in readable] + [(worker, False) for worker in late]

    def _collect(self, worker: _Worker, readable: bool, verdicts: dict) -> None:
        limit = self.timeout if worker.ready else _START_SECONDS
        reply, failure = None, f"no verdict within {limit:g} s"
        if readable:
            try:
                reply = worker.receive()
                if reply is None:
                    return
            except EOFError:
                if worker.process.wait() != -signal.SIGPROF:  # its own limit of CPU time
                    failure = "the grading process died (out of memory?)"
        if not worker.ready:
            self._started(worker, failure if reply is None else reply.get("error"))
        elif reply is None:
            verdicts[worker.job] = (False, failure, True)
            self._discard(worker)
        else:
            ended = bool(reply.get("last"))
            verdicts[worker.job] = (reply["correct"], reply["reason"], ended)
            worker.job = None
            if ended:
                self._discard(worker)

    def _started(self, worker: _Worker, problem: str | None) -> None:
        if problem is None:
            worker.ready, self._failed_starts = True, 0
            return
        self._discard(worker)
        self._failed_starts += 1
        if self._failed_starts == 3:  # one or two may have been killed by somebody else
            self._failed_starts = 0
            raise UserError(
                f"grading: math-verify does not start ({problem}); "
                "try `pip install --force-reinstall math-verify`"
            )

    def _discard(self, worker: _Worker) -> None:
        self._pool.remove(worker)
        worker.kill()
