"""Splits the vocabulary over the ranks of a process group: each rank holds its rows of the head.

There are two cases. With `process_group` (tensor parallel) the tokens are the same on every rank:
only a few numbers a token and dh are exchanged, never logits or the head. Or the head is a DTensor
that FSDP2 has sharded, and every rank has its own tokens: then the tokens are gathered first, since
hidden states are smaller than the head, and every rank takes its own results.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_kernels.tiles import state as states

# --- In the loop ---


@dataclass(frozen=True)
class Shards:
    """The rows of the vocabulary on each rank: `sizes` of the shards, in order of rank."""

    group: "dist.ProcessGroup"
    sizes: tuple[int, ...]
    rank: int

    @classmethod
    def agree(cls, name: Any, vocabulary: int, tokens: int, device: torch.device) -> "Shards":
        """Exchange the shards' sizes among all ranks of the named group, so that they plan the same
        blocks. This waits for the device once a call.

        Raises ValueError, on every rank, if their numbers of tokens differ.
        """
        group = dist.distributed_c10d._resolve_process_group(name)
        sizes, counts = zip(*_exchange((vocabulary, tokens), group, device), strict=True)
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
        """The vocabulary entry of this rank's first row."""
        return sum(self.sizes[: self.rank])

    def sum_(self, x: Tensor) -> None:
        dist.all_reduce(x, group=self.group)

    def combine_normalisers_(self, *normalisers: Tensor) -> None:
        """Combine each [3, n] over ranks to the whole vocabulary's."""
        for normaliser in normalisers:
            most = normaliser[states.MAX].clone()
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
            sums = states.referred(normaliser, most)
            self.sum_(sums)
            normaliser[states.MAX] = most
            states.set_sums_(normaliser, sums)


def _exchange(
    numbers: Sequence[int], group: "dist.ProcessGroup", device: torch.device
) -> list[list[int]]:
    """Gather every rank's numbers."""
    own = torch.tensor(numbers, device=device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    return torch.stack(found).tolist()


# --- Around the operator ---


@dataclass(frozen=True)
class Placement:
    """Where a call's head is: split over the ranks of `group`, or here (None); and whether every
    rank has its `own_tokens`.
    """

    group: "dist.ProcessGroup | None" = None
    own_tokens: bool = False
    counts: tuple[int, ...] = ()  # each rank's number of tokens, with `own_tokens`

    @property
    def name(self) -> str | None:
        """The group's name, as an operator's argument."""
        return None if self.group is None else self.group.group_name

    def with_tokens(self, count: int, device: torch.device) -> "Placement":
        """Exchange the ranks' numbers of tokens, which waits for the device."""
        if not self.own_tokens:
            return self
        counts = _exchange((count,), self.group, device)
        return Placement(self.group, True, tuple(n for (n,) in counts))

    def gather(self, x: Tensor) -> Tensor:
        """Gather all ranks' tokens: x [N, ...] -> [N_0 + N_1 + ..., ...]. Its gradient must be that
        of all ranks' losses, the same on every rank.
        """
        return _Gather.apply(x, self) if self.own_tokens else x

    def own(self, x: Tensor) -> Tensor:
        """This rank's tokens of x [all]; backward collects all ranks' gradients."""
        return _Own.apply(x, self) if self.own_tokens else x

    @property
    def rows(self) -> slice:
        """This rank's place among all tokens."""
        rank = dist.get_rank(self.group)
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])

    def vocabulary(self, rows: int, device: torch.device) -> Tensor | int:
        """V, if this rank holds `rows` of it."""
        if self.group is None:
            return rows
        total = torch.tensor(rows, device=device)
        dist.all_reduce(total, group=self.group)
        return total


def place(process_group: object, weight: Any, **others: Any) -> tuple[Placement, list[Any]]:
    """(where the call's head is, the local parts of `weight` and the others, None if None).

    DTensors must all be sharded over the vocabulary on the same one mesh dimension. Without a
    `process_group` their ranks are FSDP's, with tokens of their own: gradients of the local parts
    are then those of the mean over ranks of the loss, which FSDP computes for every parameter.
    """
    if process_group is not None and not (
        dist.is_available() and isinstance(process_group, dist.ProcessGroup)
    ):
        raise ValueError(
            f"process_group: got {process_group!r}, must be a torch.distributed process group, or "
            "None"
        )
    named = {"weight": weight, **others}
    sharded = [name for name, x in named.items() if _is_dtensor(x)]
    if not sharded:
        return Placement(process_group), list(named.values())
    for name, x in named.items():
        if x is not None:
            _check_sharded(name, x, sharded[0], named[sharded[0]])
    group = weight.device_mesh.get_group()
    ranks, given = map(_ranks, (group, process_group))
    if given not in (None, ranks):
        raise ValueError(
            f"process_group: got one of ranks {given}, must be that of weight's mesh, {ranks}, or "
            "None"
        )
    own_tokens = process_group is None
    share = 1.0 / len(ranks) if own_tokens else 1.0
    local = [
        None if x is None else _ScaledGradient.apply(x.to_local(), share) for x in named.values()
    ]
    return Placement(group, own_tokens), local


def _ranks(group: Any) -> list[int] | None:
    return None if group is None else dist.get_process_group_ranks(group)


def _is_dtensor(x: object) -> bool:
    # This does not import DTensor, which would take longer than this package.
    return hasattr(x, "placements") and hasattr(x, "device_mesh")


def _check_sharded(name: str, x: Any, like: str, other: Any) -> None:
    if not _is_dtensor(x):
        raise ValueError(
            f"{name}: got a plain tensor, must be a DTensor like {like}: a head is sharded with "
            "all its parts or not at all"
        )
    split = len(x.placements) == 1 and x.placements[0].is_shard(0)
    if not split or x.device_mesh != other.device_mesh:
        raise ValueError(
            f"{name}: got a DTensor placed as {list(x.placements)} on {x.device_mesh}, must be "
            f"[Shard(dim=0)] on one mesh dimension, {other.device_mesh}; or pass its full_tensor()"
        )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, placement: Placement) -> Tensor:
        ctx.rows = placement.rows
        # Every backend can gather bytes of equal length, so x is padded and viewed as bytes.
        most = max(placement.counts)
        padded = x.new_zeros((most, *x.shape[1:]))
        padded[: x.shape[0]] = x
        sent = padded.reshape(-1).view(torch.uint8)
        received = [torch.empty_like(sent) for _ in placement.counts]
        dist.all_gather(received, sent, group=placement.group)
        parts = [
            part.view(x.dtype).reshape(padded.shape)[:n]
            for part, n in zip(received, placement.counts, strict=True)
        ]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.rows], None


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, placement: Placement) -> Tensor:
        ctx.placement = placement
        return x[placement.rows].clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        placement = ctx.placement
        everyone = grad.new_zeros(sum(placement.counts))
        everyone[placement.rows] = grad
        dist.all_reduce(everyone, group=placement.group)
        return everyone, None


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
