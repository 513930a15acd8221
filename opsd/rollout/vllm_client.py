"""A vLLM server over HTTP: token ids in and out, its log-probabilities, and new weights.

Of the server's documented routes it uses /v1/models and /v1/completions, and of those that exist
under VLLM_SERVER_DEV_MODE=1 /server_info, /collective_rpc and /reset_prefix_cache. Weights are
given as a directory of safetensors that the server reads (`reload_weights` with
`weights_path`, vLLM's docs/training/layerwise.md): nothing of vLLM is needed on this side, and the
server may spread its model over GPUs as it likes.
"""

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import Any

from opsd.common.errors import UserError
from opsd.rollout.base import NEUTRAL, Rollout, Sampling

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which a request is sent again."""

LONGEST_WAIT = 30.0  # seconds between two attempts
QUICK = 60.0  # seconds that a question about the server may take


class ServerGoneError(UserError):
    """The server has not answered within `patience`; the run should save what it has."""


class ServerRestartedError(ServerGoneError):
    """The server has restarted since it was given the weights."""


class _PassingError(Exception):
    """A failure that may pass: send the request again."""


class VLLMServer:
    """The server at `address`. Requests are sent again after failures that may pass.

    A server's key is read from VLLM_API_KEY. Proxies are not used, since the server is the user's
    own. Raises UserError for answers that would be the same the next time.
    """

    def __init__(
        self,
        address: str,  # http://host:port
        *,
        timeout: float = 1800.0,  # seconds that one rollout, or one loading of weights, may take
        patience: float = 300.0,  # seconds of failures after which ServerGoneError is raised
        field: str = "rollout.server",  # what the user set the address by, for error messages
    ):
        self.address, self.timeout, self.patience = address.rstrip("/"), timeout, patience
        self.field = field
        self._instance: str | None = None
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        models = self.ask("/v1/models", timeout=QUICK)["data"]
        if not models:
            raise self._error("serves no model")
        self.model: str = models[0]["id"]
        self.root: str = models[0].get("root") or self.model
        self.window: int | None = models[0].get("max_model_len")

    @property
    def settings(self) -> dict[str, Any] | None:
        """The server's own configuration; None where it is not in development mode, in which case
        its weights cannot have been changed since it started."""
        found = self.ask("/server_info?config_format=json", timeout=QUICK, missing={})
        return found.get("vllm_config")

    def complete(
        self,
        context: Sequence[int],
        sampling: Sampling,
        seed: int | None,
        stops: frozenset[int],
        stop: Event | None = None,
    ) -> Rollout:
        """One rollout after `context`, with its log-probabilities; see `Rollout`."""
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
        choice = self.ask("/v1/completions", asked, stop=stop, check=_complete)["choices"][0]
        ids = choice.get("token_ids")
        if not ids:
            raise self._error("returns no token ids: it needs a vLLM that knows return_token_ids")
        if choice.get("prompt_token_ids", asked["prompt"]) != asked["prompt"]:
            raise self._error("has changed the context's token ids")
        log_probs = (choice.get("logprobs") or {}).get("token_logprobs") or []
        if len(log_probs) != len(ids) or None in log_probs:
            raise self._error(f"returns {len(log_probs)} log-probabilities for {len(ids)} tokens")
        finished = ids[-1] in stops
        if finished != (choice["finish_reason"] == "stop"):
            raise self._error(
                f"ended a rollout with token {ids[-1]} for the reason {choice['finish_reason']!r}; "
                f"the model's stops are {sorted(stops)}"
            )
        return Rollout(ids, finished, log_probs, seed)

    def load(self, weights: str | Path) -> None:
        """Serve the weights in the directory (or hub model) `weights` from now on."""
        self._instance = self._instance_now()
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(weights)}}
        # A worker that cannot read them answers 500, and would do so again.
        self.ask("/collective_rpc", call, passing=PASSING - {500})
        # What is cached was computed with the old weights. It cannot be reset while requests run.
        self.ask("/reset_prefix_cache", {}, timeout=QUICK, check=_reset)

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
        return (self.settings or {}).get("instance_id")

    def ask(
        self,
        route: str,
        body: dict | None = None,
        *,
        timeout: float | None = None,
        passing: frozenset[int] = PASSING,
        check=lambda answer: None,
        missing: dict | None = None,
        stop: Event | None = None,
    ) -> Any:
        """The JSON answer to a GET, or with `body` to a POST.

        Args:
            check: raises _PassingError for an answer that is to be asked for again.
            missing: the answer where there is no such route.
            stop: when set, failures are final.
        """
        stop = stop or Event()
        failing_since, wait = None, min(1.0, self.patience / 8)
        while True:
            try:
                answer = self._once(route, body, timeout or self.timeout, passing, missing)
                check(answer)
                return answer
            except _PassingError as error:
                now = time.monotonic()
                failing_since = now if failing_since is None else failing_since
                if now - failing_since + wait > self.patience or stop.is_set():
                    raise ServerGoneError(
                        f"{self.field} is {self.address!r}: {error}, for "
                        f"{now - failing_since:.0f} s now"
                    ) from error
            # A random wait, so that not all requests arrive at once when the server is back.
            stop.wait(wait * random.uniform(0.75, 1.25))
            wait = min(2 * wait, LONGEST_WAIT)

    def _once(
        self,
        route: str,
        body: dict | None,
        timeout: float,
        passing: frozenset[int],
        missing: dict | None,
    ) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + route, data, headers)
        try:
            with self._open(request, timeout=timeout) as response:
                text = response.read()
                return json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            if error.code == 404 and missing is not None:
                return missing
            said = f"{route} answers {error.code}: {_said(error)}"
            if error.code in passing:
                raise _PassingError(said) from error
            hint = ""
            if error.code == 404 and not route.startswith("/v1/"):
                hint = " (start it with VLLM_SERVER_DEV_MODE=1, see docs/vllm.md)"
            raise self._error(said + hint) from error
        except TimeoutError as error:
            raise _PassingError(f"{route} has not answered within {timeout:.0f} s") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            # Refused, reset, cut short; urllib wraps some of them.
            reason = getattr(error, "reason", None) or error
            raise _PassingError(f"{route} cannot be reached ({reason})") from error

    def _error(self, what: str) -> UserError:
        return UserError(f"{self.field} is {self.address!r}: the server {what}")


def _complete(answer: dict) -> None:
    reason = answer["choices"][0]["finish_reason"]
    if reason not in ("stop", "length"):  # "abort": it was told to pause, or to sleep
        raise _PassingError(f"a rollout ended with {reason!r}")


def _reset(answer: dict | None) -> None:
    if answer and not answer.get("success", True):  # an empty answer before vLLM 0.26
        raise _PassingError("the prefix cache is in use")


def _said(error: urllib.error.HTTPError) -> str:
    """What the server says of the error, on one line."""
    try:
        text = error.read(10_000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return error.reason
    try:
        answer = json.loads(text)
        inner = answer.get("error") or answer.get("detail") or answer
        text = inner.get("message", text) if isinstance(inner, dict) else str(inner)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:300]
