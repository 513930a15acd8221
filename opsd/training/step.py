"""One training step's forward: the teacher's stream, the student's stream and the fused loss.

It is one module with one forward, so that wrappers which must see every use of the weights, such as
DistributedDataParallel, see it.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opsd.common.errors import UserError
from opsd.objectives import Objective, Sample, Totals
from opsd.prefix import PrefixCache, cached_token_cost
from opsd.prefix.rollout_states import rollout_hidden_states
from opsd.training.micro_batches import (
    keepable,
    packed_batches,
    padded_batches,
    shares,
    stream_tokens,
)

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference, relative to the largest state, that sharing may make in these weights."""


class OPSDStep(nn.Module):
    """A micro-batch's part of the step's loss.

    Args:
        model: what trains.
        objective: the method; its teacher, if it has one, is not a part of this module.
        share: run each context that neighbouring samples have in common once.
        keep: and those that train, too, where their samples do not fit a micro-batch together. Not
            for DistributedDataParallel and the like, which see a gradient in one backward only.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        share: bool = True,
        keep: bool = True,
    ):
        super().__init__()
        self.model, self.objective, self.share, self.keep = model, objective, share, keep

    def forward(self, samples: Sequence[Sample], totals: Totals) -> Tensor:
        """The loss (scalar) of some of the step's samples; adds their measures to `totals`."""
        return self.objective.loss(self.model, samples, totals, share=self.share)

    def shares(self, samples: Sequence[Sample], processes: int) -> list[list[Sample]]:
        """The samples in parts of about as many tokens, one a process."""
        return shares(samples, _roles, processes)

    def micro_batches(self, samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
        """The samples in batches whose forward, in each role, holds `max_tokens` at most."""
        if not self.share:
            return padded_batches(samples, _roles, max_tokens)
        return packed_batches(samples, _roles, max_tokens, self._held())

    def prefix_cache(self, batches: Sequence[Sequence[Sample]], max_tokens: int) -> PrefixCache:
        """The contexts that `micro_batches` split over batches, to be run once for all of them."""
        learners: dict[tuple[int, ...], list[Sample]] = {}
        for sample in (sample for batch in batches for sample in batch):
            learners.setdefault(tuple(sample.roles[0].context), []).append(sample)
        held = self._held()
        training = [
            context
            for context, group in learners.items()
            if held is not None and keepable(group, _roles, max_tokens, held)
        ]
        contexts = [
            {tuple(role.context) for sample in batch for role in sample.roles} for batch in batches
        ]
        return PrefixCache(contexts if self.share else [], training)

    def _held(self) -> float | None:
        """What a kept token of a context that trains holds more; None where none is kept."""
        return cached_token_cost(self.model) if self.keep else None

    @torch.no_grad()
    def check_sharing(self, samples: Sequence[Sample], dtype: torch.dtype = torch.float32) -> float:
        """The largest difference that sharing makes, for one context's samples, without autocast.

        Relative to the largest hidden state. Raises UserError if it is more than rounding. On a
        GPU another kernel may attend in `dtype`, in which the model trains: its states are compared
        as well, and may be twice as far from those in fp32 as each rollout's own in `dtype`.
        """
        first = next((a for a, b in pairwise(samples) if _akin(a, b)), samples[0])
        sequences = [sample.roles[0] for sample in samples if _akin(sample, first)]
        training = self.model.training
        self.model.eval()  # no dropout
        alone = self._states(sequences, False, torch.float32)
        difference = float(_distance(self._states(sequences, True, torch.float32), alone))
        tolerance = TOLERANCE.get(alone.dtype, TOLERANCE[torch.bfloat16])
        if not difference <= tolerance:
            self._refuse(difference, f"at most {tolerance:g} is rounding")
        if self.model.device.type != "cpu" and dtype != torch.float32:
            self._check_rounding(sequences, alone, dtype)
        self.model.train(training)
        return difference

    def _check_rounding(self, sequences, alone: Tensor, dtype: torch.dtype) -> None:
        found, own = (self._states(sequences, share, dtype) for share in (True, False))
        error, rounding = ((x - alone).norm() / alone.norm() for x in (found, own))
        if not error <= 2 * rounding + TOLERANCE[torch.float32]:
            self._refuse(float(error), f"{dtype} alone makes {float(rounding):.2g}")

    def _states(self, sequences, share: bool, dtype: torch.dtype) -> Tensor:
        with torch.autocast(self.model.device.type, dtype, enabled=dtype != torch.float32):
            return rollout_hidden_states(self.model, sequences, share=share)

    def _refuse(self, difference: float, bound: str) -> NoReturn:
        raise UserError(
            f"train.share_prefixes: with shared prefixes {type(self.model).__name__}'s hidden "
            f"states differ by {difference:.2g} from those of each rollout alone ({bound}): train "
            "with --no-share, and please report this model"
        )


def _distance(states: Tensor, wanted: Tensor) -> Tensor:
    return (states - wanted).abs().max() / wanted.abs().max()


def idle(samples: Sequence[Sample]) -> list[Sample]:
    """A batch that costs little and adds nothing: the shortest sample, of weight 0."""
    shortest = min(samples, key=lambda sample: max(map(len, sample.roles)))
    return [replace(shortest, weight=0.0)]


def token_ratio(samples: Sequence[Sample]) -> float:
    """Tokens of each sample run alone ÷ tokens run with contexts shared, over all roles."""
    alone = sum(len(role) - 1 for sample in samples for role in sample.roles)
    return alone / sum(stream_tokens(samples, _roles))


def _roles(sample: Sample):
    return sample.roles


def _akin(a: Sample, b: Sample) -> bool:
    return a.roles[0].context == b.roles[0].context
