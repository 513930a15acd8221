"""A local HTTP server that speaks what we use of SGLang's API, backed by a tiny real model.

Routes, fields, errors and what they do are those of the real SGLang 0.5.23, which
tests/rollout/test_real_servers.py asks on a CPU, and of its sources since 0.5.9 for what needs a
GPU there: a seed decides only where inference is `deterministic`. Log-probabilities are after
temperature unless `original`, those of a context before. Weights that it does not find leave the
old ones; those that do not fit end it.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from helpers.vllm_server import FakeVLLM
from opsd.rollout import Sampling

WINDOW = 128
PARAMETERS = {
    *("max_new_tokens", "stop", "stop_token_ids", "stop_regex", "temperature", "top_p", "top_k"),
    *("min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens"),
    *("n", "json_schema", "regex", "ebnf", "structural_tag", "ignore_eos", "skip_special_tokens"),
    *("spaces_between_special_tokens", "no_stop_trim", "custom_params", "stream_interval"),
    *("logit_bias", "sampling_seed"),
}
"""The fields of SamplingParams that a caller may set."""


def refused(said: str) -> tuple[int, object]:
    """Its answer to a ValueError."""
    return 400, {"error": {"message": said}}


class FakeSGLang(FakeVLLM):
    """Serves the model in `path`; see `FakeVLLM`.

    Attributes that a test may set, beside those:
        original: SGLANG_RETURN_ORIGINAL_LOGPROB. deterministic: --enable-deterministic-inference.
        older: the routes' names before 0.5.6. starting: how often /health still answers 503.
        version_known: whether it takes a weight_version. queued: how often it finds a request in
            a queue when its cache is to be flushed.
    """

    asks_for_rollouts = "/generate"

    def __init__(self, path: Path, port: int = 0):
        self.original, self.deterministic, self.older = False, True, False
        self.starting, self.version_known, self.version, self.queued = 0, True, "default", 0
        self._unseeded = itertools.count(1_000_000)
        super().__init__(path, port)
        self.on_cpu = False

    @contextmanager
    def together(self, asked: dict) -> Iterator[None]:
        """A request among those that are under way, which a loading of weights waits for."""
        with self._counting:
            self._together += 1
        try:
            yield
        finally:
            with self._counting:
                self._together -= 1

    def answer(self, route: str, body: dict | None) -> tuple[int, object]:
        if route == "/health":
            self.starting -= 1
            return (503 if self.starting >= 0 else 200), ""
        if route == "/v1/models":
            model = {"id": str(self.path), "object": "model", "owned_by": "sglang"}
            return 200, {"data": [{**model, "root": str(self.path), "max_model_len": WINDOW}]}
        if route == ("/get_model_info" if self.older else "/model_info"):
            return 200, {
                "model_path": str(self.path),
                "tokenizer_path": str(self.path),
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": self.version,
                "model_type": self.model.config.model_type,
                "architectures": self.model.config.architectures,
            }
        if route == ("/get_server_info" if self.older else "/server_info"):
            return 200, {
                "model_path": str(self.path),
                "dtype": "auto",
                "device": "cuda",
                "enable_deterministic_inference": self.deterministic,
                "internal_states": [{"last_gen_throughput": 0.0}],
                "max_req_input_len": WINDOW - 6,
                "version": "0.5.23",
            }
        if route == "/flush_cache":
            self.queued -= 1
            if self._together or self.queued >= 0:
                return 400, "Cache not flushed.\n"
            self._first.clear()
            return 200, "Cache flushed.\nPlease check backend logs for more details.\n"
        if route == "/update_weights_from_disk":
            return self._update(body)
        if route == "/generate":
            return self._generate(body)
        return 404, {"detail": "Not Found"}

    def _restart(self) -> None:
        super()._restart()
        self.version = "default"

    def _update(self, asked: dict) -> tuple[int, object]:
        assert not self._together  # it would wait for them
        files = sorted(Path(asked["model_path"]).glob("*.safetensors"))
        if not files:
            said = "Failed to get weights iterator: Cannot find any model weights with "
            told = {"message": f"{said}`{asked['model_path']}`.", "num_paused_requests": 0}
            return 400, {"success": False, **told}
        weights = {name: w for file in files for name, w in load_file(file).items()}
        try:
            if self.loads:
                own = self.model.state_dict()
                tied = {"lm_head.weight": weights["model.embed_tokens.weight"], **weights}
                assert own.keys() == tied.keys()
                self.model.load_state_dict(tied)
                self.reloads.append(weights)
        except (RuntimeError, KeyError, AssertionError) as error:
            self.ended = True  # it rolls back by the same files
            return 500, str(error)
        if self.version_known:
            self.version = asked["weight_version"]
        if asked.get("flush_cache", True):
            self.queued -= 1
            if self.queued >= 0:
                said = "Weights were updated, but the cache was not flushed because requests are "
                said += "still running or queued. Retract or finish them, then call /flush_cache."
                return 400, {"success": False, "message": said, "num_paused_requests": 0}
            self._first.clear()
        said = f"Succeeded to update model weights. Weight version updated to {self.version}."
        return 200, {"success": True, "message": said, "num_paused_requests": 0}

    @torch.no_grad()
    def _generate(self, asked: dict) -> tuple[int, object]:
        prompt, how = asked["input_ids"], asked["sampling_params"]
        limit, top_k = how["max_new_tokens"], how["top_k"]
        assert how.keys() <= PARAMETERS, how
        if len(prompt) >= WINDOW:
            return refused(
                f"The input ({len(prompt)} tokens) is longer than the model's context length "
                f"({WINDOW} tokens)."
            )
        if len(prompt) + limit > WINDOW:
            return refused(
                f"Requested token count exceeds the model's maximum context length of {WINDOW} "
                f"tokens. You requested a total of {len(prompt) + limit} tokens"
            )
        if len(prompt) >= WINDOW - 6:
            return refused(
                f"Input length ({len(prompt)} tokens) exceeds the maximum allowed length "
                f"({WINDOW - 6} tokens). Use a shorter input or enable --allow-auto-truncate."
            )
        limit = min(limit, WINDOW - 2 - len(prompt))  # without a word
        if top_k < 1 and top_k != -1:
            return refused(f"top_k must be -1 (disable) or at least 1, got {top_k}.")
        hot = how["temperature"]
        sampling = Sampling(limit, hot, how["top_p"], max(top_k, 0))
        seed = how.get("sampling_seed") if self.deterministic else None
        stops = how["stop_token_ids"]
        ids, scores = self._drawn(
            prompt, sampling, next(self._unseeded) if seed is None else seed, stops
        )
        scale = 1.0 if self.original or not hot else hot
        drawn = [
            [float((s / scale).log_softmax(-1)[token]), token, None]
            for s, token in zip(scores, ids, strict=True)
        ]
        stopped = ids[-1] in stops
        meta = {
            "id": "0",
            "finish_reason": {"type": "stop", "matched": ids[-1]}
            if stopped
            else {"type": "length", "length": limit},
            "prompt_tokens": len(prompt),
            "weight_version": self.version,
            "num_retractions": 0,
            "completion_tokens": len(ids),
            "cached_tokens": 0,
            "output_token_logprobs": drawn,
            "input_token_logprobs": [],
            "e2e_latency": 0.1,
        }
        if asked["logprob_start_len"] == 0:
            logits = self.model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
            own = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
            pairs = zip([None, *own.tolist()], prompt, strict=True)
            meta["input_token_logprobs"] = [[value, token, None] for value, token in pairs]
        return 200, {"text": "", "output_ids": ids, "meta_info": meta}
