"""A local HTTP server with the parts of vLLM's API that we use, and a tiny real model.

Routes, fields, errors and failures are those of vLLM 0.32 on a CPU: token ids in and out,
log-probabilities before temperature, top-p and top-k, new weights from a directory. It caches each
context's first logits until its prefix cache is reset, so a client that does not reset it gets old
tokens. Its head is a copy, which only `lm_head.weight` changes. Its engine ends if it cannot read
new weights, or would have to split a prompt with a seed.
"""

import copy
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opsd.common.weight_stream import WeightReceiver
from opsd.rollout import Sampling
from opsd.rollout.logits_sampling import Draw

MUST_BE_GIVEN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields for which generation_config.json has the default."""

RECEIVER = "opsd.common.weight_stream.WeightReceiver"

INSPECTION = """Qwen3ForCausalLM()(
  (model): Qwen3Model()(
    (embed_tokens): VocabParallelEmbedding(num_embeddings={tokens}, \
num_embeddings_per_partition=64, embedding_dim={width}, org_vocab_size={tokens}, \
num_embeddings_padded=64, tp_size=1)"""
"""The beginning of get_model_inspection's answer."""


def failed(said: str) -> tuple[int, object]:
    """The server's answer when its engine has failed."""
    error = {"message": said, "type": "InternalServerError", "param": None, "code": 500}
    return 500, {"error": error}


def worker_failed(said: str) -> tuple[int, object]:
    """The server's answer to a call of its workers that fails."""
    return failed(
        f"Call to collective_rpc method failed: Worker failed with error '{said}', please check "
        "the stack trace above for the root cause"
    )


class FakeVLLM:
    """Serves the model in `path`.

    Attributes that a test may set:
        dev: VLLM_SERVER_DEV_MODE. mode: --logprobs-mode. loads: whether new weights are taken.
        rank: --max-lora-rank, or 0 without --enable-lora. may_adapt: whether it was started with
            VLLM_ALLOW_RUNTIME_LORA_UPDATING.
        on_cpu: or on a GPU, where a tied head is tied. budget: --max-num-batched-tokens.
        failures: statuses (or "drop": hang up) that the next completions get instead.
        dies_after: hang up for good after so many completions. delay: seconds before each answer.
        receives: whether its workers have our WeightReceiver.
        restarts_at: hang up at this completion, and be a new server, with the first weights.
    """

    asks_for_rollouts = "/v1/completions"

    def __init__(self, path: Path, port: int = 0):
        self.path = path
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.model.lm_head.weight = torch.nn.Parameter(self.model.lm_head.weight.detach().clone())
        self.dev, self.mode, self.loads, self.delay = True, "raw_logprobs", True, 0.0
        self.on_cpu, self.budget, self.ended = True, 16384, False
        self.rank, self.may_adapt, self.receives = 0, False, False
        self.adapted: dict[str, torch.nn.Module] = {}
        self._together, self._counting = 0, threading.Lock()
        self.failures: list[int | str] = []
        self.dies_after: int | None = None
        self.restarts_at: int | None = None
        self.instance = 0
        self.requests: list[tuple[str, dict | None]] = []
        self.reloads: list[dict[str, torch.Tensor]] = []
        self._first: dict[tuple, torch.Tensor] = {}
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"fake": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def port(self) -> int:
        return self.server.server_address[1]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def completions(self) -> list[dict]:
        return [body for route, body in self.requests if route == self.asks_for_rollouts]

    def answer(self, route: str, body: dict | None) -> tuple[int, object]:
        """(status, JSON) of a request."""
        if self.ended:
            return failed(
                "EngineCore encountered an issue. See stack trace (above) for the root cause."
            )
        if route == "/version":
            return 200, {"version": "0.32.0"}
        if route == "/v1/models":
            model = {"id": "tiny", "root": str(self.path), "max_model_len": 128}
            return 200, {"object": "list", "data": [model]}
        if route == "/v1/completions":
            return self._complete(body)
        if route.endswith("_lora_adapter") and self.may_adapt:
            return self._adapt(route, body)
        if not self.dev:
            return 404, {"detail": "Not Found"}
        if route == "/server_info?config_format=json":
            return 200, {
                "vllm_config": {
                    "model_config": {"logprobs_mode": self.mode, "dtype": "torch.float32"},
                    "device_config": {"device": "cpu" if self.on_cpu else "cuda"},
                    "scheduler_config": {"max_num_batched_tokens": self.budget},
                    "parallel_config": {"worker_extension_cls": RECEIVER if self.receives else ""},
                    "lora_config": {"max_lora_rank": self.rank} if self.rank else None,
                    "instance_id": f"instance-{self.instance}",
                },
                "vllm_env": {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": self.may_adapt},
            }
        if route == "/reset_prefix_cache":
            self._first.clear()
            return 200, {"success": True}
        if route == "/collective_rpc" and body["method"] == "get_model_inspection":
            tokens, width = self.model.lm_head.weight.shape
            return 200, {"results": [INSPECTION.format(width=width, tokens=tokens)]}
        if route == "/collective_rpc" and body["method"] == "reload_weights":
            return self._reload(Path(body["kwargs"]["weights_path"]))
        if route == "/collective_rpc" and body["method"] == "receive_weights" and self.receives:
            return self._receive(body["kwargs"])
        if route == "/collective_rpc":
            return worker_failed(f"'CPUWorker' object has no attribute '{body['method']}'")
        return 404, {"detail": "Not Found"}

    @contextmanager
    def together(self, asked: dict) -> Iterator[None]:
        """A request among those that are under way."""
        tokens = 0 if asked.get("seed") is None else len(asked["prompt"]) + 1
        with self._counting:
            self._together += tokens
            self.ended |= self.on_cpu and self._together > self.budget
        try:
            yield
        finally:
            with self._counting:
                self._together -= tokens

    def _restart(self) -> None:
        first = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)
        self.model.load_state_dict(first.state_dict())
        self._first.clear()
        self.adapted.clear()
        self.instance += 1

    def _adapt(self, route: str, body: dict) -> tuple[int, object]:
        from peft import PeftModel

        name, known = body["lora_name"], body["lora_name"] in self.adapted
        if "unload" in route and not known:
            said = f"The lora adapter '{name}' cannot be found."
            return 404, {"error": {"message": said, "type": "NotFoundError", "code": 404}}
        if "unload" in route:
            del self.adapted[name]
            return 200, f"Success: LoRA adapter '{name}' removed successfully."
        if known:
            said = f"The lora adapter '{name}' has already been loaded. If you want to load the "
            said += "adapter in place, set 'load_inplace' to True."
            return 400, {"error": {"message": said, "type": "InvalidUserInput", "code": 400}}
        adapted = PeftModel.from_pretrained(copy.deepcopy(self.model), body["lora_path"])
        self.adapted[name] = adapted.eval()
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _reload(self, directory: Path) -> tuple[int, object]:
        files = sorted(directory.glob("*.safetensors"))
        weights = {name: w for file in files for name, w in load_file(file).items()}
        if not files:  # which it looks for on the hub
            self.ended = True
            return worker_failed(
                "Repo id must be in the form 'repo_name' or 'namespace/repo_name': "
                f"'{directory}'. Use `repo_type` argument if needed."
            )
        return self._take(weights)

    def _receive(self, offer: dict) -> tuple[int, object]:
        taken: list[tuple[int, object]] = []

        class Worker(WeightReceiver):
            def reload_weights(self, weights_iterator):
                taken.append(fake._take(dict(weights_iterator)))

        fake = self
        try:
            Worker().receive_weights(**offer)
        except OSError as error:
            return worker_failed(str(error))
        return taken[0]

    def _take(self, weights: dict[str, torch.Tensor]) -> tuple[int, object]:
        if self.loads:
            self.reloads.append(weights)
            if not self.on_cpu:
                weights = {"lm_head.weight": weights["model.embed_tokens.weight"], **weights}
            missing, unknown = self.model.load_state_dict(weights, strict=False)
            assert not unknown and set(missing) <= {"lm_head.weight"}, (missing, unknown)
        return 200, {"results": [None]}

    @torch.no_grad()
    def _complete(self, asked: dict) -> tuple[int, object]:
        model = asked["model"]
        if model not in ("tiny", *self.adapted):
            said = f"The model `{asked['model']}` does not exist. Valid aliases: tiny"
            return 404, {"error": {"message": said}}
        prompt, limit = asked["prompt"], asked["max_tokens"]
        if limit > 128:
            said = f"max_tokens={limit} cannot be greater than max_model_len=128. Please request "
            said += f"fewer output tokens. (parameter=max_tokens, value={limit})"
            return 400, {"error": {"message": said}}
        if asked["temperature"] > 2:
            hot = asked["temperature"]
            said = f"temperature must be in [0, 2], got {hot}. (parameter=temperature, value={hot})"
            return 400, {"error": {"message": said}}
        if len(prompt) > 128:
            said = "This model's maximum context length is 128 tokens. However, your prompt "
            said += f"contains {len(prompt)} input tokens, which exceeds this limit even without "
            said += "any output tokens. Please reduce the length of the input prompt."
            return 400, {"error": {"message": said}}
        limit = min(limit, 128 - len(prompt))  # without a word
        if limit < 1:
            return 400, {"error": {"message": f"max_tokens must be at least 1, got {limit}."}}
        assert all(name in asked for name in MUST_BE_GIVEN), asked
        sampling = Sampling(limit, asked["temperature"], asked["top_p"], max(asked["top_k"], 0))
        stops = asked["stop_token_ids"]
        ids, scores = self._drawn(prompt, sampling, asked["seed"] or 0, stops, model)
        log_probs = [float(s.log_softmax(-1)[token]) for s, token in zip(scores, ids, strict=True)]
        stopped = ids[-1] in stops
        choice = {
            "index": 0,
            "text": "",
            "logprobs": {
                "token_logprobs": log_probs,
                "tokens": [f"token_id:{token}" for token in ids],
            },
            "finish_reason": "stop" if stopped else "length",
        }
        if asked.get("return_token_ids"):
            choice |= {"token_ids": ids, "prompt_token_ids": prompt}
        return 200, {"object": "text_completion", "model": model, "choices": [choice]}

    def _drawn(
        self,
        prompt: list[int],
        sampling: Sampling,
        seed: int,
        stops: list[int],
        model: str = "tiny",
    ) -> tuple[list[int], list[torch.Tensor]]:
        """Token ids, and the logits that each was drawn from."""
        draw = Draw(replace(sampling, temperature=sampling.temperature or 1.0))
        ids, all_scores, numbers = [], [], torch.Generator().manual_seed(seed)
        with self._lock:
            while len(ids) < sampling.max_new_tokens and not (ids and ids[-1] in stops):
                scores = self._scores(model, [*prompt, *ids])
                if sampling.temperature:
                    scores_of = draw.warpers(None, scores[None])[0].softmax(-1, dtype=torch.float64)
                    cumulative = scores_of.cumsum(-1)
                    number = torch.rand((), generator=numbers, dtype=torch.float64)
                    token = int(torch.searchsorted(cumulative, number * cumulative[-1], right=True))
                else:
                    token = int(scores.argmax())
                ids.append(token)
                all_scores.append(scores)
        return ids, all_scores

    def _scores(self, name: str, ids: list[int]) -> torch.Tensor:
        key = (name, *ids)
        if key not in self._first:
            model = self.adapted.get(name, self.model)
            scores = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            self._first[key] = scores
        return self._first[key]


class _Handler(BaseHTTPRequestHandler):
    fake: FakeVLLM

    def do_GET(self):
        self._answer(None)

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        self._answer(json.loads(self.rfile.read(length) or b"null"))

    def _answer(self, body) -> None:
        asks = self.path == self.fake.asks_for_rollouts
        with self.fake.together(body) if asks else nullcontext():
            found = self._found(body)
        if found is None:
            self.close_connection = True
            self.connection.close()
            return
        status, answer = found  # sent when it no longer counts: the client asks on at once
        text = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
        except OSError:  # the client did not wait
            self.close_connection = True

    def _found(self, body) -> tuple[int, object] | None:
        """(status, JSON); None to hang up."""
        fake = self.fake
        completes = self.path == fake.asks_for_rollouts
        with fake._lock:
            fake.requests.append((self.path, body))
            failure = fake.failures.pop(0) if completes and fake.failures else None
            restarts = completes and len(fake.completions()) == fake.restarts_at
            if restarts:
                fake._restart()
            dead = fake.dies_after is not None and len(fake.completions()) > fake.dies_after
        if dead or restarts or failure == "drop":
            return None
        time.sleep(fake.delay)
        if failure:
            return failure, {"error": {"message": "busy"}}
        return fake.answer(self.path, body)

    def log_message(self, *_):
        pass
