"""The gradient of an update: its samples in micro-batches, over all processes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from opsd.common.errors import UserError
from opsd.common.precision import autocast
from opsd.common.step_timer import phase
from opsd.common.system import release_memory, trim_heap
from opsd.config.loss import LossSection
from opsd.distributed.forward_redirection import called_through
from opsd.distributed.processes import Processes
from opsd.distributed.wrap import backward, exchange
from opsd.objectives import Sample, Totals
from opsd.objectives.log_probs import log_prob_as
from opsd.prefix import PrefixCache, using_cache
from opsd.training.failed_steps import out_of_memory
from opsd.training.step import OPSDStep, idle


class GradientAccumulator:
    """Runs samples through the step in micro-batches, and adds up their gradients.

    Args:
        step: a micro-batch's forward.
        model: what trains.
        wrapped: the model as accelerate has prepared it.
        dtype: what forward and backward run in.
        budget: tokens of a micro-batch; it is halved where memory runs out.
        split_weights: no process holds all weights, so that all must run them equally often.
        note: called with a line for the terminal, once.
    """

    def __init__(
        self,
        step: OPSDStep,
        model: PreTrainedModel,
        wrapped: nn.Module,
        accelerator: Accelerator,
        loss: LossSection,
        dtype: torch.dtype,
        budget: int,
        split_weights: bool,
        processes: Processes,
        note: Callable[[str], None],
    ):
        self.step, self.model, self.wrapped = step, model, wrapped
        self.accelerator, self.loss, self.dtype, self.budget = accelerator, loss, dtype, budget
        self.split_weights, self.processes, self.note = split_weights, processes, note
        self._split_told = False

    def __call__(self, samples: list[Sample]) -> tuple[Tensor, Totals]:
        """Add the samples' gradient to the model's; returns their loss and measures, of all
        processes. Micro-batches become smaller where memory runs out."""
        while True:
            try:
                return self._accumulate(samples)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                smaller = self._smaller(samples)
                if smaller is None:
                    raise UserError(
                        f"train.micro_batch_tokens is {self.budget}: memory has run out "
                        f"({str(error).splitlines()[0]}); lower it or loss.memory_budget, or see "
                        "docs/scale.md for what else saves memory"
                    ) from error
            # Outside, where the error and what its frames refer to are gone.
            self.note(f"Memory has run out: micro-batches of {smaller} tokens, not {self.budget}")
            self.budget = smaller
            self.wrapped.zero_grad()  # of micro-batches that were done, or half done
            release_memory()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _smaller(self, samples: list[Sample]) -> int | None:
        """Half of the micro-batch; None where that does not split one, or others wait for it."""
        longest = max(max(map(len, sample.roles)) for sample in samples)
        if self.processes.count > 1 or self.budget <= longest:
            return None
        return max(self.budget // 2, longest)

    def _accumulate(self, samples: list[Sample]) -> tuple[Tensor, Totals]:
        totals = Totals()
        loss = torch.zeros((), device=self.accelerator.device)
        own, most = self._own_batches(samples)
        cache = PrefixCache([], [])
        if not self.split_weights:
            cache = self.step.prefix_cache(own, self.budget)
        self._tell_of_split(cache, samples)
        # One autocast for all micro-batches: it casts each weight once. Backward leaves it, since
        # what runs in fp32 there is meant to.
        with autocast(loss.device, self.dtype), using_cache(cache):
            for number in range(most):
                # All processes exchange weights or gradients as often: one with fewer batches runs
                # a sample for nothing.
                work = (own[number], totals) if number < len(own) else (idle(samples), Totals())
                with exchange(self.wrapped, last=number + 1 == most):
                    some = called_through(self.wrapped, self.model, partial(self.step, *work))
                    if loss.device.type == "cpu":
                        trim_heap()  # of holes that forward left and backward has no use for
                    with phase("backward"), torch.autocast(loss.device.type, enabled=False):
                        backward(self.accelerator, self.wrapped, some)
                        cache.batch_done()
                loss += some.detach()
        if self.processes.count > 1:
            shares = self.processes.everywhere(lambda: (loss.cpu(), totals.numbers()))
            loss = sum((each for each, _ in shares), torch.zeros(())).to(loss.device)
            totals = Totals()
            for _, other in shares:
                totals.include(other)
        return loss, totals

    def _own_batches(self, samples: list[Sample]) -> tuple[list[list[Sample]], int]:
        """This process's micro-batches, and how many the busiest process has."""
        batches = [
            self.step.micro_batches(share, self.budget)
            for share in self.step.shares(samples, self.processes.count)
        ]
        return batches[self.processes.index], max(map(len, batches))

    @torch.no_grad()
    def with_old_log_probs(self, samples: list[Sample]) -> list[Sample]:
        """The samples with log p of each token under the weights as they are now."""
        places = {id(sample): place for place, sample in enumerate(samples)}
        own, most = self._own_batches(samples)
        found: dict[int, list[float]] = {}
        with autocast(self.model.device, self.dtype):
            for number in range(most):
                batch = own[number] if number < len(own) else idle(samples)
                run = partial(log_prob_as, 0, self.model, batch, self.loss, self.step.share)
                values = called_through(self.wrapped, self.model, run).tolist()
                for sample in batch if number < len(own) else ():
                    found[places[id(sample)]] = values[: sample.tokens]
                    values = values[sample.tokens :]
        everywhere = self.processes.everywhere(lambda: found)
        old = {place: values for share in everywhere for place, values in share.items()}
        return [replace(sample, old_log_probs=old[place]) for place, sample in enumerate(samples)]

    @torch.no_grad()  # or DDP would expect a backward
    def check_sharing(self, samples: list[Sample]) -> float:
        """How far shared prefixes change the hidden states. Raises UserError beyond rounding."""
        return called_through(
            self.wrapped,
            self.model,
            lambda: torch.tensor(self.step.check_sharing(samples, self.dtype)),
        ).item()

    def _tell_of_split(self, cache: PrefixCache, samples: list[Sample]) -> None:
        """Say once what becomes of a context whose rollouts do not fit a micro-batch together."""
        split = {tuple(s.roles[0].context) for s in samples if tuple(s.roles[0].context) in cache}
        if not split or self._split_told:
            return
        self._split_told = True
        what = (
            "each runs once, and what it ran is kept"
            if cache.training
            else "each runs again in every one, as there is no room to keep it"
        )
        self.note(
            f"Rollouts of {len(split)} contexts fill several micro-batches of "
            f"{self.budget} tokens: {what}"
        )
