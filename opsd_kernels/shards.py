"""The vocabulary split over the ranks of a process group: each holds its rows of the head.

What travels between ranks is a few numbers a token, and dh; never a logit.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_kernels.tiles import state as states


@dataclass(frozen=True)
class Shards:
    """Which rows of the vocabulary are where: `sizes` of all ranks' shards, in order of rank."""

    group: "dist.ProcessGroup"
    sizes: tuple[int, ...]
    rank: int

    @classmethod
    def agree(cls, group: "dist.ProcessGroup", vocabulary: int, tokens: int, device) -> "Shards":
        """All ranks tell each other their shard's size: this waits for the device once a call.

        Raises ValueError, on every rank, where they do not work on equally many tokens.
        """
        own = torch.tensor([vocabulary, tokens], device=device)
        all_of = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(all_of, own, group=group)
        sizes, counts = zip(*torch.stack(all_of).tolist(), strict=True)
        if len(set(counts)) > 1:
            raise ValueError(
                f"process_group: its ranks came with {list(counts)} tokens (of weight not 0), must "
                "be the same tokens on every rank: only the vocabulary is split"
            )
        return cls(group, sizes, dist.get_rank(group))

    @property
    def largest(self) -> int:
        return max(self.sizes)

    @property
    def offset(self) -> int:
        """The vocabulary entry that this rank's first row is."""
        return sum(self.sizes[: self.rank])

    def sum_(self, x: Tensor) -> None:
        dist.all_reduce(x, group=self.group)

    def combine_normalisers_(self, *normalisers: Tensor) -> None:
        """Each [3, n] becomes that of the whole vocabulary."""
        for normaliser in normalisers:
            most = normaliser[states.MAX].clone()
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
            states.rescale_(normaliser, most)
            self.sum_(normaliser[states.SUM :])


def find(name: str | None) -> "dist.ProcessGroup | None":
    """The group of that name. An operator's arguments are tensors, numbers and strings."""
    return None if name is None else dist.distributed_c10d._resolve_process_group(name)
