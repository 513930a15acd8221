"""One training step's forward: the teacher's stream, the student's stream and the fused loss.

It is one module with one forward, since wrappers such as DistributedDataParallel must see every use
of the weights.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opsd.common.errors import UserError
from opsd.objectives import Objective, SampleGroup, Totals
from opsd.prefix import Group, PrefixCache, cached_token_cost, rollout_hidden_states
from opsd.training.micro_batches import (
    cache_prefixes,
    packed_batches,
    padded_batches,
    separate_tokens,
    shares,
    stream_tokens,
)

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""How far sharing may move a hidden state, relative to the largest one, by the weights' dtype."""


class OPSDStep(nn.Module):
    """A micro-batch's share of the step's loss.

    Args:
        model: what trains.
        objective: the method; its teacher, if it has one, is not a part of this module.
        share: run each context once for all its rollouts.
        cache_trains: where a context's rollouts fill several micro-batches, run it once for all of
            them in training, too. Not for wrappers such as DistributedDataParallel, which see a
            gradient in one backward only. Passes without gradient share it in any case.
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
        self.share, self.cache_trains = share, cache_trains

    def forward(self, groups: Sequence[SampleGroup], totals: Totals) -> Tensor:
        """The loss (scalar) of some of the step's groups; adds their measures to `totals`."""
        return self.objective.loss(self.model, groups, totals, share=self.share)

    def shares(self, groups: Sequence[SampleGroup], processes: int) -> list[list[SampleGroup]]:
        """The groups in parts of about as many tokens, one for each process."""
        return shares(groups, processes)

    def micro_batches(
        self, groups: Sequence[SampleGroup], max_tokens: int
    ) -> list[list[SampleGroup]]:
        """The groups in batches of `max_tokens` at most in each role's forward."""
        if not self.share:
            return padded_batches(groups, max_tokens)
        return packed_batches(groups, max_tokens, self._cached_cost())

    def cache_prefixes(
        self, batches: Sequence[Sequence[SampleGroup]], max_tokens: int
    ) -> tuple[list[list[SampleGroup]], PrefixCache]:
        """The batches, whose split contexts run once for all of them, and the cache that does it.

        The cache must be told of each batch that is done.
        """
        if not self.share:
            return [list(batch) for batch in batches], PrefixCache()
        return cache_prefixes(batches, max_tokens, self._cached_cost())

    def _cached_cost(self) -> float | None:
        return cached_token_cost(self.model) if self.cache_trains else None

    @torch.no_grad()
    def check_sharing(
        self, groups: Sequence[SampleGroup], dtype: torch.dtype = torch.float32
    ) -> float:
        """The largest difference that sharing makes for one group, without autocast.

        It is relative to the largest hidden state. Raises UserError where it is more than rounding.
        On a GPU another kernel may attend in `dtype`, in which the model trains. So its states are
        compared as well: they may be twice as far from those in fp32 as the states of each rollout
        alone in `dtype`.
        """
        group = next((g for g in groups if len(g.samples) > 1), groups[0]).as_student()
        training = self.model.training
        self.model.eval()  # no dropout
        alone = self._states(group, False, torch.float32)
        difference = float(_distance(self._states(group, True, torch.float32), alone))
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


def _distance(states: Tensor, wanted: Tensor) -> Tensor:
    return (states - wanted).abs().max() / wanted.abs().max()


def idle(groups: Sequence[SampleGroup]) -> list[SampleGroup]:
    """A batch that costs little and adds nothing: the shortest sample, with the weight 0."""
    pieces = [group.of([sample]) for group in groups for sample in group.samples]
    shortest = min(pieces, key=SampleGroup.longest)
    return [shortest.of([replace(shortest.samples[0], weight=0.0)])]


def token_ratio(groups: Sequence[SampleGroup]) -> float:
    """Tokens of each rollout run alone ÷ tokens run with contexts shared, over both roles."""
    return sum(separate_tokens(groups)) / sum(stream_tokens(groups))
