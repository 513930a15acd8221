"""A server that samples, over HTTP: what vLLM's and SGLang's have in common.

Token ids in and out, log-probabilities, and new weights from a directory that the server reads:
nothing of its engine is needed on this side, and it may spread its model over GPUs as it likes. A
dialect says which routes those are.

Nothing that a server says is taken as it is: a dialect's `…_answers` says what an answer may hold,
`opsd.common.http` bounds its time and its size, and what does not fit is a ServerAnswerError.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import ClassVar, TypeVar

from pydantic import BaseModel, ValidationError
from transformers import PreTrainedConfig

from opsd.common.errors import problem_said
from opsd.common.http import (
    PASSING,
    Answer,
    NoAnswerError,
    ServerAnswerError,
    ServerGoneError,
    TooLongError,
    check_redirect,
    exchange,
    persist,
    said,
)
from opsd.rollout.base import Rollout, Sampling

Said = TypeVar("Said", bound=BaseModel)

QUICK = 60.0  # seconds that a question about the server may take
LONGEST = 16_000_000  # bytes of an answer about the server: its settings have some 100 kB
LONGEST_TOKEN = 2_000  # bytes of an answer a token: its id, its text twice, its log-probability


class ServerRestartedError(ServerGoneError):
    """The server has restarted since it was given the weights."""


class Unread(BaseModel):
    """An answer of which only the status counts."""

    @classmethod
    def model_validate_json(cls, *_, **__) -> "Unread":
        return cls()


class RolloutServer(ABC):
    """The server at `address`. Requests are sent again after failures that may pass.

    Raises ServerAnswerError for answers that would be the same the next time.
    """

    engine: ClassVar[str]  # as rollout.engine names it
    name: ClassVar[str]
    key: ClassVar[str]  # the environment variable that holds the server's key
    window_flag: ClassVar[str]  # of the server's command line
    hint: ClassVar[str]  # where it has no such route

    model: str  # the name that it serves, and the path that it was started on
    root: str
    window: int | None  # tokens of the longest sequence
    software: str  # its release, and what it computes in and on as far as it says
    loads = True  # whether it can be given weights
    copies_head = False  # whether a tied head is given to it under its own name, too

    def __init__(
        self,
        address: str,  # http://host:port
        *,
        timeout: float = 1800.0,  # seconds that one rollout, or one loading of weights, may take
        patience: float = 900.0,  # seconds of failures after which ServerGoneError is raised
        field: str = "rollout.server",  # what the user set the address by, for error messages
    ):
        self.address, self.timeout, self.patience = address.rstrip("/"), timeout, patience
        self.field = field

    @abstractmethod
    def complete(
        self,
        context: Sequence[int],
        sampling: Sampling,
        seed: int | None,
        stops: frozenset[int],
        stop: Event | None = None,
        vocabulary: int | None = None,
    ) -> Rollout:
        """One rollout after `context`, with its log-probabilities; see `Rollout`.

        vocabulary: how many logits the model has, where that is known.
        """

    @abstractmethod
    def load(self, weights: str | Path) -> None:
        """Serve the weights in the directory (or hub model) `weights` from now on."""

    @abstractmethod
    def check_restart(self) -> None:
        """Raises ServerRestartedError where the server has restarted since `load`: its answers may
        be by the weights that it starts with."""

    @abstractmethod
    def check_log_probs(self, temperature: float) -> None:
        """Raises ServerAnswerError where the log-probabilities of what is drawn at `temperature`
        are not the model's own (`Rollout.sampling_log_probs`)."""

    @abstractmethod
    def check_model(self, config: PreTrainedConfig, path: str) -> None:
        """Raises ServerAnswerError where the weights of the model in `path` would not fit into the
        one that the server has, as far as it says."""

    def at_once(self, context: int) -> int | None:
        """How many rollouts after so many tokens may be drawn by their seeds at once; None: any
        number."""
        return None

    def seeds(self, drawn: list[int | None]) -> list[int | None]:
        """The rollouts' seeds; None for those of a server that takes none."""
        return drawn

    def check_asked(self, context: int, sampling: Sampling) -> None:
        """Raises ServerAnswerError where the server would refuse rollouts after so many tokens, or
        cut them, of which it may say nothing."""
        longest = context + sampling.max_new_tokens
        if self.window is not None and longest > self.window:
            raise self._error(
                f"has a window of {self.window} tokens; a context of {context} and "
                f"{sampling.max_new_tokens} new ones are {longest}: start it with "
                f"{self.window_flag} {longest}, or ask for fewer new tokens"
            )

    def _checked(
        self,
        rollout: Rollout,
        reason: str,
        sampling: Sampling,
        stops: frozenset[int],
        vocabulary: int | None,
    ) -> Rollout:
        """The rollout, which ended for the reason 'stop' or 'length', held against what was asked.
        Rounding may lift a probability of 1 a little above it."""
        ids, log_probs = rollout.ids, rollout.sampling_log_probs or []
        if not ids:
            raise self._error("returns a rollout without tokens")
        if len(log_probs) != len(ids):
            raise self._error(f"returns {len(log_probs)} log-probabilities for {len(ids)} tokens")
        if vocabulary is not None and max(ids) >= vocabulary:
            raise self._error(f"returns token {max(ids)} of a model with {vocabulary} tokens")
        if len(ids) > sampling.max_new_tokens:
            raise self._error(
                f"returns {len(ids)} tokens where at most {sampling.max_new_tokens} were asked for"
            )
        if reason == "length" and len(ids) < sampling.max_new_tokens:
            raise self._error(
                f"cut a rollout at {len(ids)} tokens, asked for {sampling.max_new_tokens}: start "
                f"it with a larger {self.window_flag}"
            )
        if rollout.finished != (reason == "stop") or not stops.isdisjoint(ids[:-1]):
            raise self._error(
                f"ended a rollout with token {ids[-1]} for the reason {reason!r}; "
                f"the model's stops are {sorted(stops)}"
            )
        return replace(rollout, sampling_log_probs=[min(value, 0.0) for value in log_probs])

    def ask(
        self,
        route: str,
        kind: type[Said],
        body: dict | None = None,
        *,
        timeout: float | None = None,
        longest: int = LONGEST,
        passing: frozenset[int] = PASSING,
        check=lambda answer: None,
        missing: Said | None = None,
        empty: Said | None = None,
        stop: Event | None = None,
    ) -> Said:
        """The answer to a GET, or with `body` to a POST.

        Args:
            kind: what the answer must be.
            longest: bytes that it may have.
            check: raises NoAnswerError for an answer that is to be asked for again.
            missing: the answer where there is no such route.
            empty: what an answer without content says; some releases send such.
            stop: when set, failures are final.
        """
        within = timeout or self.timeout

        def attempt() -> Said:
            try:
                found = exchange(self.address, route, body, within, longest, self.key)
            except TooLongError:
                raise self._error(f"answers {route} with more than {longest:,} bytes") from None
            if found.status == 404 and missing is not None:
                return missing
            self._check_status(route, found, passing)
            bare = not found.content and empty is not None
            answer = empty if bare else self._read(route, kind, found)
            check(answer)
            return answer

        return persist(attempt, self.patience, f"{self.field} is {self.address!r}", stop)

    def _check_status(self, route: str, found: Answer, passing: frozenset[int]) -> None:
        if found.status == 200:
            return
        try:
            check_redirect(route, found)
        except ValueError as error:
            raise self._error(str(error)) from None
        told = f"{route} answers {found.status}: {said(found.content)}".rstrip(": ")
        if found.status in passing:
            raise NoAnswerError(told)
        hint = ""
        if found.status == 404 and not route.startswith("/v1/"):
            hint = f" ({self.hint})"
        raise self._error(told + hint)

    def _read(self, route: str, kind: type[Said], found: Answer) -> Said:
        try:
            return kind.model_validate_json(found.content)
        except ValidationError as error:
            problem = problem_said(error.errors()[0])
            raise self._error(f"answers {route} as no {self.name} does: {problem}") from None

    def _error(self, what: str) -> ServerAnswerError:
        return ServerAnswerError(f"{self.field} is {self.address!r}: the server {what}")
