"""The client of a vLLM server; see `opsd.rollout.server`.

It uses the documented routes /v1/models, /version and /v1/completions, those that load adapters
and, with VLLM_SERVER_DEV_MODE=1, /server_info, /collective_rpc and /reset_prefix_cache. New weights
are loaded by `reload_weights` with `weights_path` (vLLM's docs/training/layerwise.md), or over TCP
by a server with our `WeightReceiver`.
"""

import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any

from transformers import PreTrainedConfig

from opsd.common.http import PASSING, NoAnswerError, ServerAnswerError
from opsd.common.weight_stream import WeightReceiver, Weights, offered
from opsd.rollout.base import NEUTRAL, Rollout
from opsd.rollout.server import QUICK, Request, RolloutServer, Unread
from opsd.rollout.vllm_answers import (
    Completions,
    Models,
    Reset,
    Results,
    ServerInfo,
    Settings,
    Version,
)

ADAPTER = "opsd"
"""The server's name for the adapters that train."""
RECEIVER = f"{WeightReceiver.__module__}.{WeightReceiver.__name__}"
SHAPE = re.compile(r"embed_tokens\): \w+\(.*?embedding_dim=(\d+), org_vocab_size=(\d+)")
"""Finds a model's width and vocabulary in the answer of get_model_inspection."""


class VLLMServer(RolloutServer):
    """A vLLM server; see `RolloutServer`."""

    engine, name, key = "vllm_server", "vLLM", "VLLM_API_KEY"
    window_flag, cut_flag = "--max-model-len", ", and with --generation-config vllm"
    hint = "start it with VLLM_SERVER_DEV_MODE=1, see docs/vllm.md"

    def __init__(self, address: str, **how):
        super().__init__(address, **how)
        self._instance: str | None = None
        models = self.ask("/v1/models", Models, timeout=QUICK).data
        if not models:
            raise self._error("serves no model")
        self.model = models[0].id
        self.root = models[0].root or self.model
        self.window = models[0].max_model_len
        info = self._info()
        # None if it is not in development mode: then its weights cannot have changed.
        self.settings = info.vllm_config
        self.loads = self.settings is not None
        self.copies_head = self.settings is not None and self.settings.on_cpu
        extension = self.settings.parallel_config.worker_extension_cls if self.settings else None
        self.receives = extension == RECEIVER
        if self.settings and self.settings.lora_config and info.vllm_env.adapters:
            self.adapter_rank = self.settings.lora_config.max_lora_rank

    @cached_property
    def software(self) -> str:  # type: ignore[override]
        version = self.ask("/version", Version, timeout=QUICK, missing=Version()).version
        settings = self.settings or Settings()
        said = [settings.model.dtype, settings.device_config.device]
        return " ".join(["vLLM", version, *filter(None, said)])

    def check_model(self, config: PreTrainedConfig, path: str) -> None:
        call = {"method": "get_model_inspection"}
        try:
            results = self.ask("/collective_rpc", Results, call, passing=PASSING - {500}).results
        except ServerAnswerError:  # an older release does not have the method
            return
        if found := SHAPE.search(str(results[:1])):
            self._check_size((int(found[1]), int(found[2])), config, path)

    def at_once(self, context: int) -> int | None:
        """See `RolloutServer.at_once`. On a CPU vLLM 0.32 ends if it splits such a prompt ("CPU
        Generator does not use offset")."""
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

    def complete(self, request: Request, stop: Event | None = None) -> Rollout:
        context, sampling, seed, stops, _ = request
        model = ADAPTER if self.adapts else self.model
        asked = {
            "model": model,
            "prompt": list(context),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": seed,
            "stop_token_ids": sorted(stops),
            "logprobs": 0,  # only of the sampled token
            "return_token_ids": True,
            **NEUTRAL,
        }
        lost = Completions.model_construct() if self.adapts else None  # type: ignore[call-arg]
        how: dict[str, Any] = {"check": _complete, "longest": request.longest_answer}
        answer = self.ask("/v1/completions", Completions, asked, missing=lost, stop=stop, **how)
        if answer is lost:
            raise self._restarted()
        if answer.model != model:
            raise self._error(f"answers by the model {answer.model!r}, asked for {model!r}")
        choice = answer.choices[0]
        ids = choice.token_ids
        if not ids:
            raise self._error("returns no token ids: it needs a vLLM that knows return_token_ids")
        if choice.prompt_token_ids not in (None, asked["prompt"]):
            raise self._error("has changed the context's token ids")
        log_probs = choice.logprobs.token_logprobs if choice.logprobs else []
        rollout = Rollout(ids, ids[-1] in stops, log_probs, seed)
        return self._checked(rollout, choice.finish_reason, request)

    def check_log_probs(self, temperature: float) -> None:
        if self.settings and (mode := self.settings.model.logprobs_mode) != "raw_logprobs":
            raise self._error(
                f"has --logprobs-mode {mode!r}; loss.importance_bound needs 'raw_logprobs', vLLM's "
                "default"
            )

    def load(self, weights: str | Path) -> None:
        self._load(
            {"method": "reload_weights", "kwargs": {"weights_path": str(weights)}},
            f"It has not loaded {str(weights)!r}, and must be restarted: check that it sees that "
            "path (rollout.weights_dir), and serves the same model",
        )

    def send(self, weights: Callable[[], Weights]) -> None:
        host = self.persist(self.own_address)
        with offered(weights, host) as offer:
            self._load(
                {"method": "receive_weights", "kwargs": offer._asdict()},
                f"It has not read the weights from {host}, port {offer.port}: check that it can "
                "connect to this machine, or set rollout.weights_dir to a directory that both see",
            )

    def _load(self, call: dict[str, Any], hint: str) -> None:
        self._instance = self._instance_now()
        # A worker that cannot read them answers 500 and then has no model.
        try:
            none = Results(results=[])
            self.ask("/collective_rpc", Results, call, passing=PASSING - {500}, empty=none)
        except ServerAnswerError as error:
            raise ServerAnswerError(f"{error}. {hint}") from None
        self._forget_prefixes()

    def load_adapters(self, directory: Path) -> None:
        # Unload first: vLLM reads adapters that were loaded in place again at each batch.
        name = {"lora_name": ADAPTER}
        self.ask("/v1/unload_lora_adapter", Unread, name, missing=Unread())
        given = name | {"lora_path": str(directory)}
        try:
            self.ask("/v1/load_lora_adapter", Unread, given, passing=PASSING - {500})
        except ServerAnswerError as error:
            if "has already been loaded" not in str(error):  # the first answer was lost
                raise ServerAnswerError(
                    f"{error}. Without --enable-lora it is given all weights instead"
                ) from None
        self._forget_prefixes()

    def _forget_prefixes(self) -> None:
        """The cache has the old weights' states. It cannot be reset while requests run."""
        self.ask("/reset_prefix_cache", Reset, {}, timeout=QUICK, check=_reset, empty=Reset())

    @property
    def restarted(self) -> bool:
        return self._instance is None or self._instance_now() != self._instance

    def check_restart(self) -> None:
        if self._instance is not None and self.restarted:
            raise self._restarted()

    def _instance_now(self) -> str | None:
        """vLLM's `instance_id`, which changes when the server is restarted."""
        settings = self._info().vllm_config
        return settings.instance_id if settings else None

    def _info(self) -> ServerInfo:
        route = "/server_info?config_format=json"
        return self.ask(route, ServerInfo, timeout=QUICK, missing=ServerInfo())


def _complete(answer: Completions) -> None:
    if answer.choices[0].finish_reason == "abort":  # the server was told to pause or sleep
        raise NoAnswerError("a rollout ended with 'abort'")


def _reset(answer: Reset) -> None:
    if not answer.success:
        raise NoAnswerError("the prefix cache is in use")
