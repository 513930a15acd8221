"""The client of an SGLang server; see `opsd.rollout.server`.

It uses /health, /v1/models, /model_info, /server_info, /generate, /update_weights_from_disk and
/flush_cache. Each loading of weights gives them a name (`weight_version`), and every answer has the
name of its weights. So a server that restarted, or got weights from somebody else, is noticed.
"""

import secrets
from functools import cached_property
from pathlib import Path
from threading import Event

from transformers import AutoConfig, PreTrainedConfig

from opsd.common.http import PASSING, NoAnswerError, ServerAnswerError
from opsd.rollout.base import NEUTRAL, Rollout, Sampling
from opsd.rollout.server import QUICK, Request, RolloutServer, Said, Unread
from opsd.rollout.sglang_answers import Generated, MetaInfo, ModelInfo, ServerInfo, Updated
from opsd.rollout.vllm_answers import Models

PROBE = Sampling(8, temperature=4.0)
"""The sampling of a rollout that shows whether log-probabilities are after temperature."""
MARGIN = 5  # tokens; `max_req_len - max_req_input_len` in its managers/tp_worker.py
ALIKE = 0.3  # nats a token; in bf16 a rollout and its scoring differ by less


class SGLangServer(RolloutServer):
    """An SGLang server; see `RolloutServer`."""

    engine, name, key = "sglang_server", "SGLang", "SGLANG_API_KEY"
    window_flag = "--context-length"
    hint = "it needs a newer SGLang, see docs/vllm.md"

    def __init__(self, address: str, **how):
        super().__init__(address, **how)
        self._version: str | None = None  # the name of the weights from `load`
        self.ask("/health", Unread, timeout=QUICK)  # 503 until it has started
        info = self._model_info()
        self.root, self._model_type = info.model_path, info.model_type
        models = self.ask("/v1/models", Models, timeout=QUICK).data
        self.model = models[0].id if models else self.root
        self.info = self._newer("/server_info", "/get_server_info", ServerInfo)
        window, room = models and models[0].max_model_len, self.info.max_req_input_len
        # Its scheduler silently cuts what would fill the window, or its room for states.
        known = [most for most in (window and window - 2, room and room + MARGIN - 1) if most]
        self.window = min(known, default=None)

    @cached_property
    def software(self) -> str:  # type: ignore[override]
        settings = self.info.enable_deterministic_inference
        told = [self.info.dtype, self.info.device, "deterministic" if settings else None]
        return " ".join(["SGLang", self.info.version, *filter(None, told)])

    def check_model(self, config: PreTrainedConfig, path: str) -> None:
        """See `RolloutServer.check_model`. SGLang tells its model's type and path: the sizes are
        known if this machine has that path, or hub model, too."""
        if self._model_type not in (None, config.model_type):
            raise self._error(
                f"serves {self.root!r}, a {self._model_type!r}; {path!r} is a "
                f"{config.model_type!r}: start it on that"
            )
        try:
            here = {"local_files_only": True, "trust_remote_code": False}  # the server names it
            known = AutoConfig.from_pretrained(self.root, **here).get_text_config()
            theirs = known.hidden_size, known.vocab_size
        except Exception:  # not on this machine, or of no model that runs without its own code
            return
        self._check_size(theirs, config, path)

    def check_log_probs(self, temperature: float) -> None:
        """See `RolloutServer.check_log_probs`. Samples a rollout at another temperature and lets
        the server score it: scores are before temperature (`log_softmax(logits)`). The
        log-probability before temperature cannot be computed from one after it."""
        if temperature == 1:
            return
        drawn = self._generate(Request([0], PROBE)).output_token_logprobs
        scored = self._generate(Request([0, *(token[1] for token in drawn)], Sampling(1)))
        own = [token[0] for token in scored.input_token_logprobs[-len(drawn) :]]
        if len(own) != len(drawn) or None in own or not drawn:
            raise self._error("does not score a context")
        pairs = zip(drawn, own, strict=True)
        if sum(abs(token[0] - score) for token, score in pairs) > ALIKE * len(own):
            raise self._error(
                "gives log-probabilities after temperature, and rollout.temperature is "
                f"{temperature:g}: start it with SGLANG_RETURN_ORIGINAL_LOGPROB=1, or set that to 1"
            )

    def seeds(self, drawn: list[int | None]) -> list[int | None]:
        """See `RolloutServer.seeds`: the server uses seeds only with deterministic inference."""
        return drawn if self.info.enable_deterministic_inference else [None] * len(drawn)

    def complete(self, request: Request, stop: Event | None = None) -> Rollout:
        meta, context = self._generate(request, stop), request.context
        if meta.prompt_tokens != len(context):
            raise self._error(
                f"has changed the context: it has {len(context)} tokens, not {meta.prompt_tokens}"
            )
        if self._version is not None and meta.weight_version not in (None, self._version):
            raise self._restarted()
        ids = [token[1] for token in meta.output_token_logprobs]
        log_probs = [token[0] for token in meta.output_token_logprobs]
        rollout = Rollout(ids, bool(ids) and ids[-1] in request.stops, log_probs, request.seed)
        return self._checked(rollout, meta.finish_reason.type, request)

    def _generate(self, request: Request, stop: Event | None = None) -> MetaInfo:
        context, sampling, seed, stops, _ = request
        parameters = {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "stop_token_ids": sorted(stops),
            "no_stop_trim": True,
            "skip_special_tokens": False,
            **NEUTRAL,
        }
        if seed is not None:
            parameters["sampling_seed"] = seed
        asked = {
            "input_ids": list(context),
            "sampling_params": parameters,
            "return_logprob": True,
            "logprob_start_len": -1 if stops else 0,  # the probe needs the context's too
            "stream": False,
        }
        most = request.longest_answer
        answer = self.ask("/generate", Generated, asked, stop=stop, check=_finished, longest=most)
        return answer.meta_info

    def load(self, weights: str | Path) -> None:
        version = f"opsd-{secrets.token_hex(8)}"
        body = {"model_path": str(weights), "weight_version": version, "flush_cache": False}
        try:
            updated = self.ask("/update_weights_from_disk", Updated, body, passing=PASSING - {500})
            if not updated.success:
                raise self._error(f"answers /update_weights_from_disk: {updated.message!s:.300}")
        except ServerAnswerError as error:
            raise ServerAnswerError(
                f"{error}. It has not loaded {str(weights)!r}: check that it sees that path "
                "(rollout.weights_dir), and serves the same model"
            ) from None
        # It holds the old weights' states. One that was answered may still be in a queue.
        self.ask("/flush_cache", Unread, {}, timeout=QUICK, passing=PASSING | {400})
        self._version = version
        if (told := self._model_info().weight_version) != version:
            raise self._error(
                f"says that its weights are {told!r}, but it was given {version!r}: it needs an "
                "SGLang that knows weight_version, and only one run may send it weights"
            )

    def check_restart(self) -> None:
        if self._version is not None and self._model_info().weight_version != self._version:
            raise self._restarted()

    def _model_info(self) -> ModelInfo:
        return self._newer("/model_info", "/get_model_info", ModelInfo)

    def _newer(self, route: str, before: str, kind: type[Said]) -> Said:
        """The answer of `route`, or of the route `before`, which older releases have."""
        none = kind.model_construct()
        found = self.ask(route, kind, timeout=QUICK, missing=none)
        return self.ask(before, kind, timeout=QUICK) if found is none else found


def _finished(answer: Generated) -> None:
    if answer.meta_info.finish_reason.type == "abort":  # the server was paused, or has no memory
        raise NoAnswerError("a rollout ended with 'abort'")
