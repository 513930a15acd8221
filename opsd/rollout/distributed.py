"""Rollouts by several processes, each with a part of the contexts and random numbers of its own."""

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
    """Every process samples each `count`-th context; all of them get all rollouts, in order.

    Args:
        sampler: each process's own. One by a server is the same for all of them: the first process
            gives it the weights.
        whole: a whole copy of a model whose weights are split over the processes.
    """

    def __init__(
        self, sampler: Sampler, processes: Processes, whole: PreTrainedModel | None = None
    ):
        self.sampler, self.processes, self.whole = sampler, processes, whole
        self.engine, self._synced = sampler.engine, None

    def sync_weights(self, model: PreTrainedModel) -> None:
        """See `Sampler.sync_weights`."""
        self._synced = model
        if self.whole is not None:
            update_copy(self.whole, model)
            model = self.whole
        if self.engine == "vllm_server":
            self.processes.once(lambda: self.sampler.sync_weights(model))
        else:
            self.processes.together(lambda: self.sampler.sync_weights(model))

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

    def _sample(self, contexts, sampling, progress) -> list[Rollout]:
        index, count = self.processes.index, self.processes.count
        mine, before = contexts[index::count], torch.get_rng_state()

        def own() -> list[Rollout]:
            return self.sampler.sample(mine, sampling, progress) if mine else []

        try:
            parts = self.processes.everywhere(own)
        except Exception:
            torch.set_rng_state(before)  # as the process whose sampler has failed does
            raise
        rollouts: list[Rollout | None] = [None] * len(contexts)
        for other, part in enumerate(parts):
            rollouts[other::count] = part
        if progress and count > 1:
            others = [r for i, r in enumerate(rollouts) if i % count != index]
            progress(len(others), sum(len(rollout.ids) for rollout in others))
        return rollouts
