"""Is a completion's answer right?

The answer is the content of the completion's last `\\boxed{…}`. Equal texts, integers and words are
decided here; everything else goes to math-verify in a worker process. math-verify's own time limit
needs the main thread, fails silently elsewhere and cannot interrupt one long computation
(`9^{9^{9^9}}`), so the limit here is a kill: a hostile answer costs one worker and scores 0 with a
reason. Imports no torch and starts no process before it has to.

The pool is our own because those of concurrent.futures, multiprocessing and pebble start their
workers by importing the caller's main module again: a script without a main guard then fails, and a
worker that holds the caller's torch exceeds its memory limit. Their time limits count wall-clock
time, by which honest answers fail on a busy machine. Speed does not decide: all of them pass on
more than 1000 answers a second, and math-verify compares some hundred.
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
from opsd.grading.normalise import same_form, too_large

MAX_ANSWER_CHARACTERS = 4000
_WORKER = Path(__file__).with_name("worker.py")
_START_SECONDS = 120.0  # importing sympy from a cold disk on a busy machine

_PATIENCE = 6.0  # wall-clock seconds that a worker may take for each second of its CPU limit

_INTEGER = re.compile(r"([+-]?)(\d+|\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+)(?:\.0*)?")
_WORDS = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\s*\{([^{}]*)\}")


@dataclass(frozen=True)
class Grade:
    """Whether one completion's answer is right.

    reason: why, for people. extracted: the content of the last box, None without one. failed: the
    comparison was given up for want of time or memory, which counts as wrong.
    """

    correct: bool
    reason: str
    extracted: str | None
    failed: bool = False


def _plain(answer: str) -> str:
    """The answer without dollars, spacing commands, `\\text{}` and a final stop."""
    answer = answer.replace("\\,", "").replace("\\!", "").replace("{,}", ",").replace("\\$", "")
    answer = answer.replace("\N{MINUS SIGN}", "-")
    answer = _TEXT_COMMAND.sub(r"\1", answer)
    return " ".join(answer.strip("$ \n\t").rstrip("\\.").split())


_SPACE = re.compile(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])")
_SIZE = re.compile(r"\\(?:left|right)(?![A-Za-z])|(?<=\\)[dt](?=frac(?![A-Za-z]))")


def _squeezed(answer: str) -> str:
    """The answer without spaces and sizes: `\\left( 1, \\dfrac12 \\right)` → `(1,\\frac12)`.

    Spaces between letters or digits stay: `1 1/2` is not `11/2`.
    """
    return _SPACE.sub("", _SIZE.sub("", answer))


def _integer(answer: str) -> str | None:
    """The digits of an answer that is a plain integer, in one form for each number; else None."""
    match = _INTEGER.fullmatch(answer)
    if match is None:
        return None
    digits = match[2].replace(",", "").replace(" ", "").lstrip("0") or "0"
    return "-" + digits if match[1] == "-" and digits != "0" else digits


def _is_words(answer: str) -> bool:
    # Two letters may well be a product; three or more are taken as a word.
    letters = sum(character.isalpha() for character in answer)
    return bool(_WORDS.fullmatch(answer)) and (letters > 2 or answer.casefold() == "no")


def _grade_here(extracted: str, answer: str) -> Grade | None:
    """The grade where text alone decides; None where math-verify has to."""
    given, wanted = _plain(extracted), _plain(answer)
    if extracted == answer.strip() or given == wanted != "":
        return Grade(True, "the same text", extracted)
    if given == "":
        return Grade(False, "the box is empty", extracted)
    if len(extracted) > MAX_ANSWER_CHARACTERS:
        reason = f"the answer is longer than {MAX_ANSWER_CHARACTERS} characters"
        return Grade(False, reason, extracted, failed=True)
    given_integer, wanted_integer = _integer(given), _integer(wanted)
    if _squeezed(given) == _squeezed(wanted):
        return Grade(True, "the same text", extracted)
    if given_integer is not None and wanted_integer is not None:
        equal = given_integer == wanted_integer
        return Grade(equal, "equal integers" if equal else "different integers", extracted)
    equal = same_form(given, wanted)
    if equal is not None:
        return Grade(equal, "the same form" if equal else "different", extracted)
    if too_large(given) or too_large(wanted):
        return Grade(False, "a number too large to compare", extracted, failed=True)
    if _is_words(given) and _is_words(wanted):
        # math-verify reads words as products of letters: to it `listen` equals `silent`.
        equal = given.casefold() == wanted.casefold()
        return Grade(equal, "the same words" if equal else "different words", extracted)
    return None


class _Worker:
    """One process and the (answer, reference) that it compares: None while it starts or waits.

    `deadline`: by time.monotonic().
    """

    def __init__(self, memory_limit: int, timeout: float):
        # A session of its own: Ctrl-C in the terminal reaches only the parent, which then ends its
        # workers.
        self.process = subprocess.Popen(
            [sys.executable, str(_WORKER), str(memory_limit), str(timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        self.ready = False
        self.pair: tuple[str, str] | None = None
        self.deadline = time.monotonic() + _START_SECONDS
        self._received = b""

    def give(self, pair: tuple[str, str], timeout: float) -> None:
        """Raises BrokenPipeError if the process is gone."""
        line = memoryview(json.dumps(pair).encode() + b"\n")
        while line:
            line = line[self.process.stdin.write(line) :]
        self.pair, self.deadline = pair, time.monotonic() + _PATIENCE * timeout

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
    workers: processes at most; memory_limit: bytes of address space of each. May be called from any
    thread, one call at a time. Workers start when first needed, are replaced when they die, and end
    with `close()`, with the object, or with this process. Raises UserError for numbers out of
    range. docs/evaluate.md says how answers are compared.

    >>> with Grader() as grader:
    ...     grades = grader.grade([r"So \boxed{1,024}.", "1024"], ["1024", "1024"])
    >>> [(grade.correct, grade.reason) for grade in grades]
    [(True, 'equal integers'), (False, 'no \\boxed answer')]
    """

    def __init__(self, *, timeout: float = 5.0, workers: int = 1, memory_limit: int = 2 << 30):
        if not 0 < timeout < math.inf:
            raise UserError(f"timeout: {timeout!r} is not a positive, finite number of seconds")
        if workers < 1:
            raise UserError(f"workers: {workers!r} is not a positive number of processes")
        if memory_limit < 256 << 20:
            raise UserError(
                f"memory_limit: {memory_limit!r} is below 256 MiB, which a worker needs"
            )
        self.timeout, self.workers, self.memory_limit = timeout, workers, memory_limit
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
        """One Grade for each completion, in order. Equal pairs are compared once.

        Raises ValueError if the lengths differ or an answer is empty, UserError if math-verify
        cannot be started.
        """
        if len(completions) != len(answers):
            raise ValueError(f"{len(completions)} completions for {len(answers)} answers")
        grades: list[Grade | None] = []
        hard: dict[tuple[str, str], list[int]] = {}  # (answer, reference) → where it occurs
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
                compared = self._compare(list(hard))
            for pair, indices in hard.items():
                for index in indices:
                    grades[index] = compared[pair]
        return grades

    def _compare(self, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], Grade]:
        """The grade of each (answer, reference), by workers side by side."""
        waiting = deque(pairs)
        grades: dict[tuple[str, str], Grade] = {}
        try:
            while len(grades) < len(pairs):
                self._assign(waiting, open_pairs=len(pairs) - len(grades))
                for worker, readable in self._wait():
                    self._collect(worker, readable, grades)
        except BaseException:
            # Also on Ctrl-C: a worker with an unread reply would answer the next question with it.
            self.close()
            raise
        return grades

    def _assign(self, waiting: deque, open_pairs: int) -> None:
        for worker in list(self._pool):
            if worker.ready and worker.pair is None and worker.process.poll() is not None:
                self._discard(worker)  # killed from outside while idle: costs no answer
        while len(self._pool) < min(self.workers, open_pairs):
            self._pool.append(_Worker(self.memory_limit, self.timeout))
        for worker in self._pool:
            if waiting and worker.ready and worker.pair is None:
                try:
                    worker.give(waiting[0], self.timeout)
                except BrokenPipeError:
                    continue  # it died just now: replaced in the next round
                waiting.popleft()

    def _wait(self) -> list[tuple[_Worker, bool]]:
        """Waits until workers have written or ended (True), or are past their deadline (False)."""
        active = [worker for worker in self._pool if worker.pair is not None or not worker.ready]
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

    def _collect(self, worker: _Worker, readable: bool, grades: dict) -> None:
        limit = self.timeout if worker.ready else _START_SECONDS
        reply, failure = None, f"no verdict within {limit:g} s"
        if readable:
            try:
                reply = worker.receive()
                if reply is None:
                    return
            except EOFError:
                if worker.process.wait() != -signal.SIGPROF:  # the signal of its own CPU limit
                    failure = "the grading process died (out of memory?)"
        if not worker.ready:
            self._started(worker, failure if reply is None else reply.get("error"))
            return
        ended = reply is None or bool(reply.get("last"))
        correct, reason = (False, failure) if reply is None else (reply["correct"], reply["reason"])
        grades[worker.pair] = Grade(correct, reason, worker.pair[0], failed=ended)
        worker.pair = None
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
