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
from opsd.objectives import SampleGroup, Totals, samples_of
from opsd.objectives.log_probs import rollout_log_prob
from opsd.prefix import CachedPrefix, PrefixCache
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

    def __call__(self, groups: list[SampleGroup]) -> tuple[Tensor, Totals]:
        """Add the groups' gradient to the model's; returns their loss and measures, of all
        processes. Micro-batches become smaller where memory runs out."""
        while True:
            try:
                return self._accumulate(groups)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                smaller = self._smaller(groups)
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

    def _smaller(self, groups: list[SampleGroup]) -> int | None:
        """Half of the micro-batch; None where that does not split one, or others wait for it."""
        longest = max(group.longest() for group in groups)
        if self.processes.count > 1 or self.budget <= longest:
            return None
        return max(self.budget // 2, longest)

    def _accumulate(self, groups: list[SampleGroup]) -> tuple[Tensor, Totals]:
        totals = Totals()
        loss = torch.zeros((), device=self.accelerator.device)
        own, most = self._own_batches(groups)
        cache = PrefixCache()
        if not self.split_weights:
            own, cache = self.step.cache_prefixes(own, self.budget)
        self._tell_of_split(own)
        # One autocast for all micro-batches: it casts each weight once. Backward leaves it, since
        # what runs in fp32 there is meant to.
        with autocast(loss.device, self.dtype):
            for number in range(most):
                # All processes exchange weights or gradients as often: one with fewer batches runs
                # a sample for nothing.
                work = (own[number], totals) if number < len(own) else (idle(groups), Totals())
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

    def _own_batches(self, groups: list[SampleGroup]) -> tuple[list[list[SampleGroup]], int]:
        """This process's micro-batches, and how many the busiest process has."""
        batches = [
            self.step.micro_batches(share, self.budget)
            for share in self.step.shares(groups, self.processes.count)
        ]
        return batches[self.processes.index], max(map(len, batches))

    @torch.no_grad()
    def with_old_log_probs(self, groups: list[SampleGroup]) -> list[SampleGroup]:
        """The groups with log p of each token under the weights as they are now."""
        places = {id(sample): place for place, sample in enumerate(samples_of(groups))}
        own, most = self._own_batches(groups)
        found: dict[int, list[float]] = {}
        with autocast(self.model.device, self.dtype):
            for number in range(most):
                batch = own[number] if number < len(own) else idle(groups)
                run = partial(
                    rollout_log_prob,
                    self.model,
                    batch,
                    self.loss,
                    self.step.share,
                    sampling=self.step.objective.sampling,
                )
                values = called_through(self.wrapped, self.model, run).tolist()
                for sample in samples_of(batch) if number < len(own) else ():
                    found[places[id(sample)]] = values[: sample.tokens]
                    values = values[sample.tokens :]
        everywhere = self.processes.everywhere(lambda: found)
        old = {place: values for share in everywhere for place, values in share.items()}
        return [
            group.of([replace(s, old_log_probs=old[places[id(s)]]) for s in group.samples])
            for group in groups
        ]

    @torch.no_grad()  # or DDP would expect a backward
    def check_sharing(self, groups: list[SampleGroup]) -> float:
        """How far shared prefixes change the hidden states. Raises UserError beyond rounding."""
        return called_through(
            self.wrapped,
            self.model,
            lambda: torch.tensor(self.step.check_sharing(groups, self.dtype)),
        ).item()

    def _tell_of_split(self, batches: list[list[SampleGroup]]) -> None:
        """Say once what becomes of a context whose rollouts do not fit a micro-batch together."""
        contexts = [group.student for batch in batches for group in batch]
        split = {id(context): context for context in contexts if isinstance(context, CachedPrefix)}
        if not split or self._split_told:
            return
        self._split_told = True
        what = (
            "each runs once, and what it ran is kept"
            if any(context.trains for context in split.values())
            else "each runs again in every one, as there is no room to keep it"
        )
        self.note(
            f"Rollouts of {len(split)} contexts fill several micro-batches of "
            f"{self.budget} tokens: {what}"
        )
