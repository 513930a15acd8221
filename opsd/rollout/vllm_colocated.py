"""Samples with vLLM in this process, on the GPU that trains. It sleeps during training."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd.common.errors import UserError
from opsd.common.random_states import random_states, set_random_states
from opsd.common.system import vllm_is_for_cpus
from opsd.config.sections import ModelSection
from opsd.models.adapter_files import model_files
from opsd.models.copies import named_weights
from opsd.rollout.base import NEUTRAL, Contexts, Progress, Rollout, Sampling, draw_seeds


class ColocatedSampler:
    """vLLM's `LLM`: awake from `sync_weights` to the end of `sample`, otherwise asleep (level 2).
    If it is asked to sample again without new weights, it wakes up and gets the same ones.

    Args:
        path: the model's directory or hub name.
        trains: `sync_weights` brings the weights. If False, they are read from `path`, and the
            engine never sleeps.
        memory: the share of the GPU's memory that it may use while it is awake.
        settings: further arguments of `LLM`.
    """

    engine = "vllm"

    def __init__(
        self,
        path: str,
        stops: frozenset[int],
        *,
        trains: bool,
        dtype: torch.dtype,
        memory: float,
        **settings: Any,
    ):
        if model_files(ModelSection(path=path, revision=settings.get("revision"))).adapters:
            raise UserError(f"vllm: {path!r} is an adapter, which it cannot load here; merge it")
        # Run in this process, so that new weights can be passed as tensors.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        with _untouched():
            import vllm

            self.stops, self.dtype, self.trains, self._vllm = stops, dtype, trains, vllm
            self._on_cpu = vllm_is_for_cpus()
            self._sleeps = trains and not self._on_cpu  # on a CPU there is no GPU memory to share
            if self._on_cpu:
                # Seeded sampling after a split prompt fails ("CPU Generator does not use offset").
                settings["enable_chunked_prefill"] = False
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                settings["distributed_executor_backend"] = "external_launcher"  # one engine a rank
            self.llm = vllm.LLM(
                model=path,
                dtype=str(dtype).removeprefix("torch."),
                gpu_memory_utilization=memory,
                enable_sleep_mode=self._sleeps,
                load_format="dummy" if trains else "auto",
                logprobs_mode="raw_logprobs",
                generation_config="vllm",  # not the model's own
                **settings,
            )
        self._awake = True
        self._weights_of: PreTrainedModel | None = None
        self.sync: dict[str, float] = {}
        self._sleep()

    def sync_weights(self, model: PreTrainedModel) -> None:
        assert self.trains
        self._weights_of = model
        torch.cuda.empty_cache()  # so that vLLM can use memory that torch's allocator keeps
        self._wake("weights")
        # On a CPU vLLM 0.32 has a second copy of a tied head, with a name of its own.
        weights = named_weights(model, self.dtype, head_too=self._on_cpu)
        self.sync, start = {"sync_bytes": 0}, time.monotonic()
        given = {"weights_iterator": self._counted(weights)}
        self.llm.collective_rpc("reload_weights", kwargs=given)
        self.sync["sync_seconds"] = time.monotonic() - start
        self._wake("kv_cache")
        self.llm.reset_prefix_cache()
        self._awake = True

    def sample(
        self, contexts: Contexts, sampling: Sampling, progress: Progress | None = None
    ) -> list[Rollout]:
        """One rollout for each context, in order; see `Sampler.sample`."""
        if not self._awake:  # more problems of the same step; asleep, it would never answer
            self.sync_weights(self._weights_of)
        seeds = draw_seeds(sampling, len(contexts))
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(context)} for context in contexts],
            [self._parameters(sampling, seed) for seed in seeds],
            use_tqdm=False,
        )
        rollouts = [
            self._rollout(output.outputs[0], seed)
            for output, seed in zip(outputs, seeds, strict=True)
        ]
        if progress:
            progress(len(rollouts), sum(len(rollout.ids) for rollout in rollouts))
        self._sleep()
        return rollouts

    def _counted(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights:
            self.sync["sync_bytes"] += weight.nbytes
            yield name, weight

    def _wake(self, what: str) -> None:
        if self._sleeps:
            self.llm.wake_up(tags=[what])

    def _sleep(self) -> None:
        if self._sleeps:
            self.llm.sleep(level=2)
            self._awake = False

    def _parameters(self, sampling: Sampling, seed: int | None):
        return self._vllm.SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=seed,
            stop_token_ids=sorted(self.stops),
            **NEUTRAL,
            logprobs=0,  # only of the sampled token
            detokenize=False,
        )

    def _rollout(self, output, seed: int | None) -> Rollout:
        ids = list(output.token_ids)
        log_probs = [
            of_token[token].logprob for of_token, token in zip(output.logprobs, ids, strict=True)
        ]
        return Rollout(ids, ids[-1] in self.stops, log_probs, seed)


@contextmanager
def _untouched() -> Iterator[None]:
    """A context that restores random states and torch's threads, which vLLM changes."""
    states, threads = random_states(), torch.get_num_threads()
    try:
        yield
    finally:
        set_random_states(states)
        torch.set_num_threads(threads)
