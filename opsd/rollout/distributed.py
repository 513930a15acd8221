"""Rollouts by several processes: each has its share of the contexts and its own random numbers."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from opsd.distributed.processes import Processes
from opsd.models.copies import update_copy
from opsd.rollout.base import Rollout, Sampler, Sampling
from opsd.rollout.vllm_client import ServerRestartedError

RESTARTS = 3
"""Of a server, during one sampling."""


class DistributedSampler:
    """Of n processes each samples every n-th context; all get all rollouts, in order.

    Args:
        sampler: each process has one. A server is the same for all of them, so the first process
            gives it the weights.
        inference_copy: holds all weights, where the model's are split over the processes.
    """

    def __init__(
        self, sampler: Sampler, processes: Processes, inference_copy: PreTrainedModel | None = None
    ):
        self.sampler, self.processes = sampler, processes
        self.inference_copy = inference_copy
        self.engine, self.software = sampler.engine, getattr(sampler, "software", None)
        self._synced: PreTrainedModel | None = None

    def sync_weights(self, model: PreTrainedModel) -> None:
        """See `Sampler.sync_weights`."""
        self._synced = model
        if self.inference_copy is not None:
            update_copy(self.inference_copy, model)
            model = self.inference_copy
        if self.engine == "vllm_server":
            self.processes.once(lambda: self.sampler.sync_weights(model))
        else:
            self.processes.together(lambda: self.sampler.sync_weights(model))

    @property
    def sync(self) -> dict[str, float]:
        """What the last `sync_weights` cost, for the log, where weights go to another engine."""
        return getattr(self.sampler, "sync", {})

    def sample(
        self,
        contexts: Sequence[Sequence[int]],
        sampling: Sampling,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Rollout]:
        """One rollout a context, in order; see `Sampler.sample`. A server that was started anew
        meanwhile is given the weights again, and asked again."""
        for _ in range(RESTARTS):
            try:
                return self._sample(contexts, sampling, progress)
            except ServerRestartedError:
                self.sync_weights(self._synced)
        return self._sample(contexts, sampling, progress)

    def _sample(
        self,
        contexts: Sequence[Sequence[int]],
        sampling: Sampling,
        progress: Callable[[int, int], None] | None,
    ) -> list[Rollout]:
        index, count = self.processes.index, self.processes.count
        mine, before = contexts[index::count], torch.get_rng_state()

        def own() -> list[Rollout]:
            return self.sampler.sample(mine, sampling, progress) if mine else []

        try:
            by_process = self.processes.everywhere(own)
        except Exception:
            torch.set_rng_state(before)  # so does the process whose sampler has failed
            raise
        rollouts: list[Rollout | None] = [None] * len(contexts)
        for other, sampled in enumerate(by_process):
            rollouts[other::count] = sampled
        if progress and count > 1:
            others = [r for i, r in enumerate(rollouts) if i % count != index]
            progress(len(others), sum(len(rollout.ids) for rollout in others))
        return rollouts
