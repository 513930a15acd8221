"""Samples with several processes: each has its share of the contexts and its own random numbers."""

from concurrent.futures import Future, wait
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from opsd.common.http import ServerError
from opsd.config.names import SERVERS
from opsd.distributed.processes import Processes
from opsd.models.copies import update_copy
from opsd.rollout.base import Contexts, Progress, Rollout, Sampler, Sampling
from opsd.rollout.server import ServerRestartedError

RESTARTS = 3
"""How many restarts of a server are tolerated during one sampling."""


class DistributedSampler:
    """Each of n processes samples every n-th context; all get all rollouts, in order.

    Args:
        sampler: each process has one. A server is the same for all of them, so only the first
            process gives it the weights.
        inference_copy: has all weights, if the model's are split over the processes.
    """

    def __init__(
        self, sampler: Sampler, processes: Processes, inference_copy: PreTrainedModel | None = None
    ):
        self.sampler, self.processes = sampler, processes
        self.inference_copy = inference_copy
        self.engine, self.software = sampler.engine, getattr(sampler, "software", None)
        self.said = getattr(sampler, "said", None)  # how weights reach another engine
        self._synced: PreTrainedModel | None = None
        self._ahead: RolloutsAhead | None = None

    def sync_weights(self, model: PreTrainedModel) -> None:
        """See `Sampler.sync_weights`. First waits for rollouts that are being sampled ahead."""
        if self._ahead is not None:
            self._ahead.wait()
        self._synced = model
        if self.inference_copy is not None:
            update_copy(self.inference_copy, model)
            model = self.inference_copy
        if self.engine in SERVERS:
            self.processes.once(lambda: self.sampler.sync_weights(model))
        else:
            self.processes.together(lambda: self.sampler.sync_weights(model))

    @property
    def sync(self) -> dict[str, float]:
        """The cost of the last `sync_weights`, for the log; {} if the engine has none."""
        return getattr(self.sampler, "sync", {})

    def sample(
        self, contexts: Contexts, sampling: Sampling, progress: Progress | None = None
    ) -> list[Rollout]:
        """One rollout for each context, in order; see `Sampler.sample`. If a server was restarted
        meanwhile, it gets the weights again and is asked again."""
        for _ in range(RESTARTS):
            try:
                return self._sample(contexts, sampling, progress)
            except ServerRestartedError:
                self.sync_weights(self._synced)
        return self._sample(contexts, sampling, progress)

    def begin(self, contexts: Contexts, sampling: Sampling) -> "RolloutsAhead":
        """Start `sample` by a server, in the background."""
        mine = contexts[self.processes.index :: self.processes.count]
        begin = self.sampler.begin  # type: ignore[attr-defined]  # a server's has it
        own = self.processes.together(lambda: begin(mine, sampling))
        self._ahead = RolloutsAhead(own, len(contexts), self.processes)
        return self._ahead

    def cancel(self) -> None:
        """Cancel sampling that was begun."""
        if self._ahead is not None:
            self._ahead.own.cancel()

    def _sample(
        self, contexts: Contexts, sampling: Sampling, progress: Progress | None
    ) -> list[Rollout]:
        index, count = self.processes.index, self.processes.count
        mine, before = contexts[index::count], torch.get_rng_state()

        def own() -> list[Rollout]:
            return self.sampler.sample(mine, sampling, progress) if mine else []

        try:
            by_process = self.processes.everywhere(own)
        except Exception:
            torch.set_rng_state(before)  # as in the process whose sampler failed
            raise
        rollouts = _in_order(by_process, len(contexts))
        if progress and count > 1:
            others = [r for i, r in enumerate(rollouts) if i % count != index]
            progress(len(others), sum(len(rollout.ids) for rollout in others))
        return rollouts


@dataclass(frozen=True)
class RolloutsAhead:
    """Rollouts that are being sampled in the background."""

    own: Future[list[Rollout]]  # this process's rollouts
    count: int  # the number of all processes' rollouts
    processes: Processes

    @classmethod
    def of(cls, rollouts: list[Rollout], processes: Processes) -> "RolloutsAhead":
        """Wrap rollouts that are already there."""
        own: Future[list[Rollout]] = Future()
        own.set_result(rollouts[processes.index :: processes.count])
        return cls(own, len(rollouts), processes)

    def wait(self, seconds: float | None = None) -> None:
        """Wait until this process's are done or have failed; at most so many seconds."""
        wait([self.own], seconds)

    def result(self, seconds: float | None = None) -> list[Rollout]:
        """All processes' rollouts, in the contexts' order. Raises what `Sampler.sample` does, in
        all of them; TimeoutError if they are not done within so many seconds."""
        return _in_order(self.processes.everywhere(lambda: self.own.result(seconds)), self.count)

    def kept(self) -> list[Rollout] | None:
        """All processes' rollouts; None if they are not done or have failed."""
        try:
            return self.result(0)
        except (TimeoutError, ServerError):
            return None


def _in_order(by_process: list[list[Rollout]], count: int) -> list[Rollout]:
    """Merge the processes' rollouts, of which each has every n-th, in the contexts' order."""
    rollouts: list[Rollout | None] = [None] * count
    for number, sampled in enumerate(by_process):
        rollouts[number :: len(by_process)] = sampled
    return rollouts
