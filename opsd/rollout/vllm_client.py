"""A vLLM server over HTTP: token ids in and out, its log-probabilities, and new weights.

Of the server's documented routes it uses /v1/models, /version and /v1/completions, and of those
that exist under VLLM_SERVER_DEV_MODE=1 /server_info, /collective_rpc and /reset_prefix_cache.
Weights are given as a directory of safetensors that the server reads (`reload_weights` with
`weights_path`, vLLM's docs/training/layerwise.md): nothing of vLLM is needed on this side, and the
server may spread its model over GPUs as it likes.

Nothing that a server says is taken as it is: `vllm_answers` says what an answer may hold,
`opsd.common.http` bounds its time and its size, and what does not fit is a ServerAnswerError.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import TypeVar

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
from opsd.rollout.base import NEUTRAL, Rollout, Sampling
from opsd.rollout.vllm_answers import (
    Completions,
    Models,
    Reset,
    Results,
    ServerInfo,
    Settings,
    Version,
)

Said = TypeVar("Said", bound=BaseModel)

QUICK = 60.0  # seconds that a question about the server may take
LONGEST = 16_000_000  # bytes of an answer about the server: its settings have some 100 kB
SHAPE = re.compile(r"embed_tokens\): \w+\(.*?embedding_dim=(\d+), org_vocab_size=(\d+)")
"""What get_model_inspection shows of a model's width and vocabulary."""
LONGEST_TOKEN = 2_000  # bytes of an answer a token: its id, its text twice, its log-probability


class ServerRestartedError(ServerGoneError):
    """The server has restarted since it was given the weights."""


class VLLMServer:
    """The server at `address`. Requests are sent again after failures that may pass.

    A server's key is read from VLLM_API_KEY. Raises ServerAnswerError for answers that would be the
    same the next time.
    """

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
        self._instance: str | None = None
        models = self.ask("/v1/models", Models, timeout=QUICK).data
        if not models:
            raise self._error("serves no model")
        self.model: str = models[0].id
        self.root: str = models[0].root or self.model
        self.window = models[0].max_model_len
        # None where it is not in development mode, in which case its weights cannot have been
        # changed since it started
        self.settings = self._settings_now()

    @cached_property
    def software(self) -> str:
        """Its release, and what it computes in and on as far as it says."""
        version = self.ask("/version", Version, timeout=QUICK, missing=Version()).version
        settings = self.settings or Settings()
        said = [settings.model.dtype, settings.device_config.device]
        return " ".join(["vLLM", version, *filter(None, said)])

    def check_model(self, config: PreTrainedConfig, path: str) -> None:
        """Raises ServerAnswerError where the weights of the model in `path` would not fit into the
        one that the server has. vLLM ends when it finds that out."""
        call = {"method": "get_model_inspection"}
        try:
            results = self.ask("/collective_rpc", Results, call, passing=PASSING - {500}).results
        except ServerAnswerError:  # an older release
            return
        text = config.get_text_config()
        ours = (text.hidden_size, text.vocab_size)
        found = SHAPE.search(str(results[:1]))
        theirs = tuple(map(int, found.groups())) if found else ours
        if theirs != ours:
            raise self._error(
                f"serves {self.root!r}, of width {theirs[0]} with {theirs[1]} tokens; {path!r} is "
                f"of width {ours[0]} with {ours[1]}: start it on that"
            )

    def at_once(self, context: int) -> int | None:
        """How many rollouts after so many tokens may be drawn by their seeds at once; None: any
        number. On a CPU vLLM 0.32 ends where it splits such a prompt ("CPU Generator does not use
        offset")."""
        settings = self.settings
        most = settings.scheduler_config.max_num_batched_tokens if settings else None
        if most is None or not settings.on_cpu:
            return None
        if context >= most:
            raise self._error(
                f"computes {most} tokens at once, and a context has {context}: start it with "
                f"--max-num-batched-tokens {context + 1} or more"
            )
        return most // (context + 1)

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
        asked = {
            "model": self.model,
            "prompt": list(context),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": seed,
            "stop_token_ids": sorted(stops),
            "logprobs": 0,  # of the drawn token alone
            "return_token_ids": True,
            **NEUTRAL,
        }
        longest = LONGEST + LONGEST_TOKEN * (sampling.max_new_tokens + len(context))
        answer = self.ask(
            "/v1/completions", Completions, asked, stop=stop, check=_complete, longest=longest
        )
        if answer.model != self.model:
            raise self._error(f"answers by the model {answer.model!r}, asked for {self.model!r}")
        choice = answer.choices[0]
        ids, reason = choice.token_ids, choice.finish_reason
        if not ids:
            raise self._error("returns no token ids: it needs a vLLM that knows return_token_ids")
        if choice.prompt_token_ids not in (None, asked["prompt"]):
            raise self._error("has changed the context's token ids")
        log_probs = choice.logprobs.token_logprobs if choice.logprobs else []
        if len(log_probs) != len(ids):
            raise self._error(f"returns {len(log_probs)} log-probabilities for {len(ids)} tokens")
        if vocabulary is not None and max(ids) >= vocabulary:
            raise self._error(f"returns token {max(ids)} of a model with {vocabulary} tokens")
        self._check_length(len(ids), sampling.max_new_tokens, reason)
        finished = ids[-1] in stops
        if finished != (reason == "stop") or not stops.isdisjoint(ids[:-1]):
            raise self._error(
                f"ended a rollout with token {ids[-1]} for the reason {reason!r}; "
                f"the model's stops are {sorted(stops)}"
            )
        return Rollout(ids, finished, [min(value, 0.0) for value in log_probs], seed)

    def check_asked(self, context: int, sampling: Sampling) -> None:
        """Raises ServerAnswerError where the server would refuse rollouts after so many tokens, or
        cut them: vLLM takes what its window leaves, and says nothing."""
        longest = context + sampling.max_new_tokens
        if self.window is not None and longest > self.window:
            raise self._error(
                f"has a window of {self.window} tokens; a context of {context} and "
                f"{sampling.max_new_tokens} new ones are {longest}: start it with --max-model-len "
                f"{longest}, or ask for fewer new tokens"
            )

    def _check_length(self, length: int, longest: int, reason: str) -> None:
        """A rollout that is cut is cut where we asked."""
        if length > longest:
            raise self._error(f"returns {length} tokens where at most {longest} were asked for")
        if reason == "length" and length < longest:
            raise self._error(
                f"cut a rollout at {length} tokens, asked for {longest}: start it with a larger "
                "--max-model-len, and with --generation-config vllm"
            )

    def load(self, weights: str | Path) -> None:
        """Serve the weights in the directory (or hub model) `weights` from now on."""
        self._instance = self._instance_now()
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(weights)}}
        # A worker that cannot read them answers 500, and has no model from then on.
        try:
            self.ask(
                "/collective_rpc", Results, call, passing=PASSING - {500}, empty=Results(results=[])
            )
        except ServerAnswerError as error:
            raise ServerAnswerError(
                f"{error}. It has not loaded {str(weights)!r}, and must be started anew: look "
                "whether it sees that path (rollout.weights_dir), and serves the same model"
            ) from None
        # What is cached was computed with the old weights. It cannot be reset while requests run.
        self.ask("/reset_prefix_cache", Reset, {}, timeout=QUICK, check=_reset, empty=Reset())

    def check_restart(self) -> None:
        """Raises ServerRestartedError where the server has restarted since `load`: its answers may
        be by the weights that it starts with."""
        if self._instance is not None and self._instance_now() != self._instance:
            raise ServerRestartedError(
                f"{self.field} is {self.address!r}: the server was started anew in the middle of a "
                "step, and had forgotten the weights"
            )

    def _instance_now(self) -> str | None:
        """vLLM's `instance_id`, which is new at each start of a server."""
        settings = self._settings_now()
        return settings.instance_id if settings else None

    def _settings_now(self) -> Settings | None:
        route = "/server_info?config_format=json"
        return self.ask(route, ServerInfo, timeout=QUICK, missing=ServerInfo()).vllm_config

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
            empty: what an answer without content says; some releases of vLLM send such.
            stop: when set, failures are final.
        """
        within = timeout or self.timeout

        def attempt() -> Said:
            try:
                found = exchange(self.address, route, body, within, longest)
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
            hint = " (start it with VLLM_SERVER_DEV_MODE=1, see docs/vllm.md)"
        raise self._error(told + hint)

    def _read(self, route: str, kind: type[Said], found: Answer) -> Said:
        try:
            return kind.model_validate_json(found.content)
        except ValidationError as error:
            problem = problem_said(error.errors()[0])
            raise self._error(f"answers {route} as no vLLM does: {problem}") from None

    def _error(self, what: str) -> ServerAnswerError:
        return ServerAnswerError(f"{self.field} is {self.address!r}: the server {what}")


def _complete(answer: Completions) -> None:
    if answer.choices[0].finish_reason == "abort":  # it was told to pause, or to sleep
        raise NoAnswerError("a rollout ended with 'abort'")


def _reset(answer: Reset) -> None:
    if not answer.success:
        raise NoAnswerError("the prefix cache is in use")
