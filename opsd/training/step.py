"""Computes an update's gradient: runs its samples in micro-batches, over all processes.

A micro-batch's forward is the teacher's stream, the student's stream and the fused loss. It is one
module with one forward, because wrappers such as DistributedDataParallel must see every use of the
weights.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from opsd.common.errors import UserError
from opsd.common.precision import autocast, compute_dtype
from opsd.common.step_timer import phase
from opsd.common.system import release_memory
from opsd.config.sections import TrainSection
from opsd.distributed.processes import SPLIT_WEIGHTS, Processes
from opsd.distributed.wrap import backward, called_through, exchange
from opsd.models.dropout import switch_off_dropout
from opsd.objectives import Objective, SampleGroup, Totals, samples_of
from opsd.objectives.groups import scored_tokens, shortest
from opsd.objectives.log_probs import rollout_log_prob
from opsd.prefix import (
    CachedPrefix,
    Group,
    PrefixCache,
    by_tiles,
    cached_token_cost,
    rollout_hidden_states,
    uncontinuable,
    unpackable,
)
from opsd.training.failed_steps import out_of_memory
from opsd.training.micro_batches import (
    cache_prefixes,
    packed_batches,
    padded_batches,
    separate_tokens,
    shares,
    stream_tokens,
)

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""How much sharing may change a hidden state, relative to the largest, by the weights' dtype."""


class OPSDStep(nn.Module):
    """Computes a micro-batch's part of the step's loss.

    model: the trained model. objective: the method; its teacher is not a submodule. share: run each
    context once for all its rollouts. cache_trains: a context whose rollouts fill several
    micro-batches also gets its gradient only once for all of them. Wrappers such as
    DistributedDataParallel do not allow that: they see a gradient in one backward only. Passes
    without gradient always share a context.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        share: bool = True,
        cache_trains: bool = True,
    ):
        super().__init__()
        self.model, self.objective = model, objective
        # A cached context runs outside of the micro-batches, whose tokens the routers' loss counts.
        self.cache_trains = cache_trains and not objective.section.router_aux
        self.share = share
        # Then each of the student's rollouts counts as a row of its own, with its context.
        self.padded = share and unpackable(model) is not None
        if objective.samples_rollouts:
            switch_off_dropout(model)  # rollouts were sampled without dropout
        for member in objective.members:
            if member.model is not None:
                switch_off_dropout(member.model)

    def forward(self, groups: Sequence[SampleGroup], totals: Totals) -> Tensor:
        """The loss (scalar) of some of the step's groups; adds their measures to `totals`."""
        return self.objective.loss(self.model, groups, totals, share=self.share)

    def micro_batches(
        self, groups: Sequence[SampleGroup], max_tokens: int
    ) -> list[list[SampleGroup]]:
        """Divide the groups into batches of at most `max_tokens` in each role's forward."""
        if not self.share:
            return padded_batches(groups, max_tokens)
        return packed_batches(groups, max_tokens, self._cached_cost(), self.padded)

    def cache_prefixes(
        self, batches: Sequence[Sequence[SampleGroup]], max_tokens: int
    ) -> tuple[list[list[SampleGroup]], PrefixCache]:
        """Cache contexts that several batches share. Returns the batches and the cache.

        Call `batch_done` of the cache after each batch.
        """
        if not self.share:
            return [list(batch) for batch in batches], PrefixCache()
        return cache_prefixes(batches, max_tokens, self._cached_cost())

    def _cached_cost(self) -> float | None:
        return cached_token_cost(self.model) if self.cache_trains and not self.padded else None

    @property
    def alone(self) -> bool:
        """Whether each of the student's rollouts runs with a context of its own."""
        return self.padded and uncontinuable(self.model, trains=True) is not None

    @torch.no_grad()
    def check_sharing(
        self, groups: Sequence[SampleGroup], dtype: torch.dtype = torch.float32
    ) -> float:
        """The largest change of a hidden state by sharing, for one group, without autocast.

        It is relative to the largest hidden state. Raises UserError if it is more than rounding. On
        a GPU another kernel may compute attention in `dtype`, in which the model trains. So the
        states in `dtype` are compared as well: with sharing they may be twice as far from those in
        fp32 as without.
        """
        group = next((g for g in groups if len(g.samples) > 1), groups[0]).as_student()
        training = self.model.training
        self.model.eval()  # no dropout
        alone = self._states(group, False, torch.float32)
        # A kernel that computes only in 16 bits is compared below.
        with by_tiles() if dtype != torch.float32 else nullcontext():
            shared = self._states(group, True, torch.float32)
        difference = float((shared - alone).abs().max() / alone.abs().max())
        tolerance = TOLERANCE.get(alone.dtype, TOLERANCE[torch.bfloat16])
        if not difference <= tolerance:
            self._refuse(difference, f"at most {tolerance:g} is rounding")
        if self.model.device.type != "cpu" and dtype != torch.float32:
            self._check_rounding(group, alone, dtype)
        self.model.train(training)
        return difference

    def _check_rounding(self, group: Group, alone: Tensor, dtype: torch.dtype) -> None:
        shared, own = (self._states(group, share, dtype) for share in (True, False))
        error, rounding = ((x - alone).norm() / alone.norm() for x in (shared, own))
        if not error <= 2 * rounding + TOLERANCE[torch.float32]:
            self._refuse(float(error), f"{dtype} alone makes {float(rounding):.2g}")

    def _states(self, group: Group, share: bool, dtype: torch.dtype) -> Tensor:
        with torch.autocast(self.model.device.type, dtype, enabled=dtype != torch.float32):
            return rollout_hidden_states(self.model, [group], share=share)

    def _refuse(self, difference: float, bound: str) -> NoReturn:
        raise UserError(
            f"train.share_prefixes: with shared prefixes {type(self.model).__name__}'s hidden "
            f"states differ by {difference:.2g} from those of each rollout alone ({bound}): train "
            "with --no-share, and please report this model"
        )


def what_is_shared(
    model: PreTrainedModel, objective: Objective, train: TrainSection, note: Callable[[str], None]
) -> bool:
    """Whether passes share their contexts; calls `note` with the reason if some do not."""
    reason = unpackable(model) if train.share_prefixes else None
    if reason is None:
        return train.share_prefixes
    # It takes more forwards; with split weights all processes must run equally many.
    if train.sharding not in SPLIT_WEIGHTS:
        whole = objective.section.router_aux or train.gradient_checkpointing
        if not whole and uncontinuable(model, trains=True) is None:
            return True
        if any(m.model is not None for m in objective.members) and uncontinuable(model) is None:
            note(f"{reason}: the teacher's prefixes are shared, the student's are not")
            return True
    note(f"{reason}: prefixes are not shared, each rollout runs with its own")
    return False


def idle(groups: Sequence[SampleGroup]) -> list[SampleGroup]:
    """A batch that costs little and adds nothing: the shortest sample, with weight 0."""
    piece = shortest(groups)
    return [piece.of([replace(piece.samples[0], weight=0.0)])]


def token_ratio(groups: Sequence[SampleGroup], alone: bool = False) -> float:
    """Tokens with each rollout run alone ÷ tokens with shared contexts, over all roles. alone: the
    student shares none."""
    separate, shared = separate_tokens(groups), stream_tokens(groups)
    return sum(separate) / (sum(shared) + (separate.student - shared.student) * alone)


@dataclass
class GradientAccumulator:
    """Runs samples through the step in micro-batches and accumulates their gradients."""

    step: OPSDStep  # computes a micro-batch's loss
    wrapped: nn.Module  # the model as accelerate wraps it
    accelerator: Accelerator
    train: TrainSection  # the run's `train`
    processes: Processes
    note: Callable[[str], None]  # shows a line in the terminal
    _split_told: bool = False

    def __post_init__(self):
        self.dtype = compute_dtype(self.train.precision)  # of forward and backward
        # Tokens of a micro-batch; halved when memory runs out.
        self.budget = self.train.micro_batch_tokens

    def __call__(self, groups: list[SampleGroup]) -> tuple[Tensor, Totals]:
        """Add the groups' gradient to the model's. Returns loss and measures, summed over all
        processes. Halves the micro-batches when memory runs out."""
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
            # Outside of `except`, so that the error and its frames no longer hold memory.
            self.note(f"Memory has run out: micro-batches of {smaller} tokens, not {self.budget}")
            self.budget = smaller
            self.wrapped.zero_grad()  # drops the gradients of the micro-batches so far
            release_memory()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _smaller(self, groups: list[SampleGroup]) -> int | None:
        """Half of the budget; None if it splits nothing, or other processes would wait."""
        longest = max(group.longest() for group in groups)
        if self.processes.count > 1 or self.budget <= longest:
            return None
        return max(self.budget // 2, longest)

    def _accumulate(self, groups: list[SampleGroup]) -> tuple[Tensor, Totals]:
        totals = Totals()
        self.step.objective.heads, self.step.objective.tokens = {}, scored_tokens(groups)
        loss = torch.zeros((), device=self.accelerator.device)
        own, most = self._own_batches(groups)
        cache = PrefixCache()
        # With split weights, all processes must run the model equally often.
        if self.train.sharding not in SPLIT_WEIGHTS:
            own, cache = self.step.cache_prefixes(own, self.budget)
        self._tell_of_split(own)
        # One autocast for all micro-batches, which casts each weight only once. Backward runs
        # outside of it: what is in fp32 there must stay so.
        with autocast(loss.device, self.dtype):
            for number in range(most):
                # All processes must exchange weights or gradients equally often, so one with fewer
                # batches runs idle ones.
                work = (own[number], totals) if number < len(own) else (idle(groups), Totals())
                with exchange(self.wrapped, last=number + 1 == most):
                    some = called_through(self.wrapped, self.step.model, partial(self.step, *work))
                    with phase("backward"), torch.autocast(loss.device.type, enabled=False):
                        backward(self.accelerator, self.wrapped, some)
                        cache.batch_done()
                loss += some.detach()
        self.step.objective.heads = self.step.objective.tokens = None
        if self.processes.count > 1:
            shares = self.processes.everywhere(lambda: (loss.cpu(), totals.numbers()))
            loss = sum((each for each, _ in shares), torch.zeros(())).to(loss.device)
            totals = Totals()
            for _, other in shares:
                totals.include(other)
        return loss, totals

    def _own_batches(self, groups: list[SampleGroup]) -> tuple[list[list[SampleGroup]], int]:
        """This process's micro-batches, and the largest number of them that a process has."""
        batches = [
            self.step.micro_batches(share, self.budget)
            for share in shares(groups, self.processes.count)
        ]
        return batches[self.processes.index], max(map(len, batches))

    @torch.no_grad()
    def with_old_log_probs(self, groups: list[SampleGroup]) -> list[SampleGroup]:
        """The groups with `old_log_probs`: log p of each token under the current weights."""
        places = {id(sample): place for place, sample in enumerate(samples_of(groups))}
        own, most = self._own_batches(groups)
        found: dict[int, list[float]] = {}
        model, objective = self.step.model, self.step.objective
        with autocast(model.device, self.dtype):
            for number in range(most):
                batch = own[number] if number < len(own) else idle(groups)
                how = objective.section, self.step.share, objective.sampling
                run = partial(rollout_log_prob, model, batch, *how)
                values = called_through(self.wrapped, model, run).tolist()
                for sample in samples_of(batch) if number < len(own) else ():
                    found[places[id(sample)]] = values[: sample.tokens]
                    values = values[sample.tokens :]
        everywhere = self.processes.everywhere(lambda: found)
        old = {place: values for share in everywhere for place, values in share.items()}
        return [
            group.of([replace(s, old_log_probs=old[places[id(s)]]) for s in group.samples])
            for group in groups
        ]

    @torch.no_grad()  # otherwise DDP expects a backward
    def check_sharing(self, groups: list[SampleGroup]) -> float:
        """`OPSDStep.check_sharing` inside the wrapper's forward."""
        check = partial(self.step.check_sharing, groups, self.dtype)
        return called_through(self.wrapped, self.step.model, lambda: torch.tensor(check())).item()

    def _tell_of_split(self, batches: list[list[SampleGroup]]) -> None:
        """Show a note, once, if the rollouts of a context fill several micro-batches."""
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
