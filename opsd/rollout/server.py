"""The client of a server that samples, over HTTP: what vLLM's and SGLang's have in common.

Token ids in and out, log-probabilities, and new weights from a directory that the server reads:
this side needs nothing of the engine, and the server may split its model over GPUs. A dialect names
the routes.

Answers are not trusted: a dialect's `…_answers` has their schemas, `opsd.common.http` limits their
time and size, and what does not fit raises ServerAnswerError.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import ClassVar, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError
from transformers import PreTrainedConfig

from opsd.common import http
from opsd.common.errors import problem_said
from opsd.common.weight_stream import Weights
from opsd.rollout.base import Rollout, Sampling

Said = TypeVar("Said", bound=BaseModel)

QUICK = 60.0  # seconds for an answer about the server
LONGEST = 16_000_000  # bytes of an answer about the server; its settings have some 100 kB
LONGEST_TOKEN = 2_000  # bytes of an answer for each token: id, text twice, log-probability


class ServerRestartedError(http.ServerGoneError):
    """The server has restarted since it got the weights."""


class Unread(BaseModel):
    """An answer of which only the status is read."""

    @classmethod
    def model_validate_json(cls, *_, **__) -> "Unread":
        return cls()


class Request(NamedTuple):
    """One rollout to sample after `context`; vocabulary: how many logits there are, if known."""

    context: Sequence[int]
    sampling: Sampling
    seed: int | None = None
    stops: frozenset[int] = frozenset()
    vocabulary: int | None = None

    @property
    def longest_answer(self) -> int:
        """The most bytes of its answer."""
        return LONGEST + LONGEST_TOKEN * (self.sampling.max_new_tokens + len(self.context))


class RolloutServer(ABC, http.Server):
    """The server at `address`. Requests are repeated after failures that may pass.

    Raises ServerAnswerError for answers that would be the same the next time.
    """

    engine: ClassVar[str]  # its name in rollout.engine
    name: ClassVar[str]
    window_flag: ClassVar[str]  # the server's option for the longest sequence
    cut_flag: ClassVar[str] = ""  # its other options that let no rollout be cut

    model: str  # the name that it serves
    root: str  # the path with which it was started
    window: int | None  # tokens of the longest sequence
    software: str  # its release, dtype and device, as far as it tells them
    loads = True  # it can load new weights
    receives = False  # it can read weights over TCP
    adapter_rank = 0  # the largest rank of adapters that it can load; 0: it loads none
    adapts = False  # rollouts use the adapters that it has loaded
    copies_head = False  # it needs a tied head under its own name, too

    def __init__(
        self,
        address: str,  # http://host:port
        *,
        timeout: float = 1800.0,  # seconds for one rollout, or for loading weights
        patience: float = 900.0,  # seconds of failures before ServerGoneError is raised
        field: str = "rollout.server",  # the option with the address, for error messages
    ):
        self.address, self.timeout, self.patience = address.rstrip("/"), timeout, patience
        self.field = field

    @abstractmethod
    def complete(self, request: Request, stop: Event | None = None) -> Rollout:
        """Sample one rollout, with its log-probabilities; see `Rollout`. stop: see `ask`."""

    @abstractmethod
    def load(self, weights: str | Path) -> None:
        """Load the weights in the directory (or hub model) `weights`."""

    def send(self, weights: Callable[[], Weights]) -> None:
        """Have it load the weights without files. Each of its workers reads all of them."""
        raise self._error("cannot read weights over TCP")

    def load_adapters(self, directory: Path) -> None:
        """Load the adapters in `directory`; the weights stay."""
        raise self._error("takes no adapters")

    @property
    def restarted(self) -> bool:
        """Whether the server may have restarted since `load`."""
        return True

    @abstractmethod
    def check_restart(self) -> None:
        """Raise ServerRestartedError if the server has restarted since `load`: it may have answered
        with the weights with which it starts."""

    @abstractmethod
    def check_log_probs(self, temperature: float) -> None:
        """Raise ServerAnswerError if the log-probabilities of tokens sampled at `temperature` are
        not the model's own (`Rollout.sampling_log_probs`)."""

    @abstractmethod
    def check_model(self, config: PreTrainedConfig, path: str) -> None:
        """Raise ServerAnswerError if the weights of the model in `path` do not fit the server's
        model, as far as that is known: loading them would end the server."""

    def _check_size(self, theirs: tuple[int, int], config: PreTrainedConfig, path: str) -> None:
        """theirs: the width of the server's model, and the number of its tokens."""
        ours = config.get_text_config()
        if theirs != (ours.hidden_size, ours.vocab_size):
            raise self._error(
                f"serves {self.root!r}, of width {theirs[0]} with {theirs[1]} tokens; {path!r} is "
                f"of width {ours.hidden_size} with {ours.vocab_size}: start it on that"
            )

    def at_once(self, context: int) -> int | None:
        """The most rollouts with seeds to sample at once after so many tokens; None: any number."""
        return None

    def seeds(self, drawn: list[int | None]) -> list[int | None]:
        """The seeds to send with the rollouts; None for a server that takes none."""
        return drawn

    def check_asked(self, context: int, sampling: Sampling) -> None:
        """Raise ServerAnswerError if the server would refuse rollouts after so many tokens, or
        silently cut them to fit its window."""
        longest = context + sampling.max_new_tokens
        if self.window is not None and longest > self.window:
            raise self._error(
                f"has a window of {self.window} tokens; a context of {context} and "
                f"{sampling.max_new_tokens} new ones are {longest}: start it with "
                f"{self.window_flag} {longest}, or ask for fewer new tokens"
            )

    def _checked(self, rollout: Rollout, reason: str, request: Request) -> Rollout:
        """Check a rollout, which ended for the reason 'stop' or 'length', against the request.
        Log-probabilities that rounding made positive become 0."""
        most, stops, vocabulary = request.sampling.max_new_tokens, request.stops, request.vocabulary
        ids, log_probs = rollout.ids, rollout.sampling_log_probs or []
        if not ids:
            raise self._error("returns a rollout without tokens")
        if len(log_probs) != len(ids):
            raise self._error(f"returns {len(log_probs)} log-probabilities for {len(ids)} tokens")
        if vocabulary is not None and max(ids) >= vocabulary:
            raise self._error(f"returns token {max(ids)} of a model with {vocabulary} tokens")
        if len(ids) > most:
            raise self._error(f"returns {len(ids)} tokens where at most {most} were asked for")
        if reason == "length" and len(ids) < most:
            raise self._error(
                f"cut a rollout at {len(ids)} tokens, asked for {most}: start it with a larger "
                f"{self.window_flag}{self.cut_flag}"
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
        passing: frozenset[int] = http.PASSING,
        check=lambda answer: None,
        missing: Said | None = None,
        empty: Said | None = None,
        stop: Event | None = None,
    ) -> Said:
        """Send a GET, or with `body` a POST, and return the answer.

        Args:
            kind: the answer's schema.
            longest: the most bytes of the answer.
            check: raises NoAnswerError for an answer after which to ask again.
            missing: the answer if the route does not exist.
            empty: the meaning of an answer without content, which some releases send.
            stop: when set, failures are final.
        """

        def attempt() -> Said:
            try:
                found = self.fetch(route, body, timeout or self.timeout, longest, passing)
            except http.NoRouteError:
                if missing is None:
                    raise
                return missing
            answer = empty if empty and not found else self._read(route, kind, found)
            check(answer)
            return answer

        return self.persist(attempt, stop)

    def _read(self, route: str, kind: type[Said], found: bytes) -> Said:
        try:
            return kind.model_validate_json(found)
        except ValidationError as error:
            told = f"gives {route} an answer that {self.name} never gives: "
            raise self._error(told + problem_said(error.errors()[0])) from None

    def _restarted(self) -> ServerRestartedError:
        return ServerRestartedError(
            f"{self.field} is {self.address!r}: the server was started anew in the middle of a "
            "step, or given other weights"
        )
