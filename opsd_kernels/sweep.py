"""Sweeps the vocabulary for a block of tokens, tile by tile: products in, gradients out.

    for tile in sweep:                       # h W^T of every role for [n tokens, v entries]
        backend.gradient_(*tile.roles, ..., gradients.room(tile))
        gradients.add(tile)                  # dh += G W, dW += G^T h

If a tile is as wide as the vocabulary, its products are computed once, and later passes use them
again: that is the only difference between one pass and two.

Shapes: n tokens of a block, m of a group, N of a call, V vocabulary entries (this rank's, where
they are split over ranks), v of a tile, D hidden width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_kernels import gemm
from opsd_kernels.plan import Cost, Plan, plan
from opsd_kernels.sharded import Shards
from opsd_kernels.tiles import state as states
from opsd_kernels.tiles.logits import Logits

GPU_BUDGET = 2**30
FAST_ROWS = 256  # preferred tokens in a block on a GPU: then arithmetic bounds the product


@dataclass(frozen=True)
class Head:
    """A role's weight [V, D] and bias [V]."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Want:
    """Which gradients a call computes."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias

    @property
    def head(self) -> bool:
        return self.weight or self.bias


@dataclass(frozen=True)
class Tile:
    """A block of tokens with some columns of the vocabulary."""

    columns: slice
    roles: tuple[Logits, ...]  # student, then teacher


def plan_call(
    hidden: tuple[Tensor, ...],
    heads: tuple[Head, ...],
    backend,
    *,
    two_sums: bool,
    vocabulary: int,
    budget: int | None,
    trains_head: bool,
) -> Plan:
    """Make a call's plan. `two_sums`: two passes compute dh as two sums (see `Gradients`).
    `vocabulary`: V, or the largest shard's. trains_head: dW is wanted.
    """
    first, dtype = hidden[0], gemm.tile_dtype(hidden[0].dtype)
    item, width = dtype.itemsize, first.shape[1]
    on_gpu = first.device.type != "cpu"
    widths = sum(h.shape[1] for h in hidden)
    widened = widths * item if gemm.widens(first) else 0
    stacked = widths * first.element_size() if _share(heads) and not widened else 0
    temporaries = backend.TEMPORARIES
    if len(heads) == 1:
        temporaries = getattr(backend, "LOG_PROB_TEMPORARIES", temporaries)
    # Backward alone may need it, but runs the call again within the same budget.
    wide_gradient = gemm.gradient_dtype(first.dtype) != dtype
    cost = Cost(
        entry=len(heads) * item,
        temporaries=temporaries * item,
        slice_entries=getattr(backend, "slice_entries", lambda device: 2**62)(first.device),
        token=states.ROWS * item + widened,
        one_pass_token=stacked,
        tiles_token=width * item if two_sums else 0,
        column=max(h.weight.shape[1] for h in heads) * item if widened else 0,
        slice_columns=gemm.SLICE,
        gradient=first.element_size() if gemm.narrows(first) else 0,
        group_token=width * item if wide_gradient else 0,
    )
    # Summing dW in fp32 over groups costs as much memory again, so groups are not used for dh
    # alone.
    grouped = gemm.narrows(first) and trains_head
    tokens = first.shape[0]
    if budget is None and on_gpu:
        budget = max(GPU_BUDGET, cost.bytes(1, vocabulary, True))
        if grouped:
            # Rather than memory for the sum over groups, use as much to have only one group.
            summed = item * vocabulary * width
            budget = max(budget, summed)
            whole = cost.bytes(min(FAST_ROWS, tokens), vocabulary, True, tokens)
            budget = whole if budget < whole <= budget + summed else budget
    fast = {"fast_rows": FAST_ROWS, "fast_columns": 4096} if on_gpu else {}
    return plan(tokens, vocabulary, cost, budget=budget, grouped=grouped, **fast)


def _share(heads: tuple[Head, ...]) -> bool:
    return len(heads) == 2 and heads[0].weight is heads[1].weight


class Sweep:
    """Computes the products of one block of tokens, `columns` vocabulary entries at a time."""

    def __init__(
        self, hidden: tuple[Tensor, ...], heads: tuple[Head, ...], columns: int, buffer: Tensor
    ) -> None:
        """hidden: [n, D] of each role; buffer: memory for every role's [n, columns]."""
        self.rows, self.vocabulary = hidden[0].shape[0], heads[0].weight.shape[0]
        self.columns, self.heads, self.buffer = columns, heads, buffer
        self.hidden = self._operands(hidden)
        self.whole_tile: Tile | None = None

    def _operands(self, hidden: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Prepare the hidden states as operands. If one product computes both roles, they are
        stacked, so that a shared head is read once.
        """
        self.stacked = None
        dtype = self.buffer.dtype if gemm.widens(hidden[0]) else hidden[0].dtype
        if not (_share(self.heads) and self.columns >= self.vocabulary):
            return tuple(h.to(dtype) for h in hidden)
        self.stacked = hidden[0].new_empty((2 * self.rows, hidden[0].shape[1]), dtype=dtype)
        halves = self.stacked.tensor_split(2)
        for half, h in zip(halves, hidden, strict=True):
            half.copy_(h)
        return halves

    @property
    def student(self) -> Tensor:
        """The student's [n, D], as operand of dW."""
        return self.hidden[0]

    def __iter__(self) -> Iterator[Tile]:
        if self.whole_tile is not None:
            yield self.whole_tile
            return
        for start in range(0, self.vocabulary, self.columns):
            tile = self._products(slice(start, min(start + self.columns, self.vocabulary)))
            if self.columns >= self.vocabulary:
                self.whole_tile = tile
            yield tile

    def _products(self, columns: slice) -> Tile:
        width = columns.stop - columns.start
        roles = len(self.heads)
        room = self.buffer[: roles * self.rows * width].view(roles * self.rows, width)
        products = room.tensor_split(roles)
        if self.stacked is not None:
            gemm.logits_(room, self.stacked, self.heads[0].weight)
        else:
            for out, hidden, head in zip(products, self.hidden, self.heads, strict=True):
                gemm.logits_(out, hidden, head.weight[columns])
        biases = (None if head.bias is None else head.bias[columns] for head in self.heads)
        return Tile(columns, tuple(map(Logits, products, biases)))


class Gradients:
    """The gradients of the student's hidden states and head, summed over tiles and groups in fp32.

    dh of a block may be computed as two sums, A = sum_v p W_v and B = sum_v S W_v. Then dh = A -
    (sum p) B, where sum p is known only after the last tile.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        want: Want,
        plan: Plan,
        narrow: Tensor | None,
        unit: Tensor | None,
    ) -> None:
        """hidden: [N, D] of the call. narrow: memory for a group's gradients in the operands'
        dtype. unit: the factor of the tiles' gradients, see `gemm.gradient_unit`.
        """
        self.hidden, self.head, self.narrow = hidden, head, narrow
        self.dtype, self.group = gemm.tile_dtype(hidden.dtype), plan.group
        weight = head.weight
        self.kept = plan.group > plan.rows  # gradients are kept: a group has several blocks
        self.once = plan.groups <= 1  # there is one group, so each tile completes its part of dW
        self.unit = unit
        kept_in = gemm.gradient_dtype(hidden.dtype)
        self.d_hidden = torch.zeros_like(hidden, dtype=kept_in) if want.hidden else None
        self.d_weight = self.d_bias = None
        if want.weight:
            summed_in = gemm.gradient_dtype(weight.dtype) if self.once else self.dtype
            new = torch.empty_like if plan.groups == 1 else torch.zeros_like
            self.d_weight = new(weight, dtype=summed_in)
        if want.bias:
            self.d_bias = weight.new_zeros(weight.shape[0], dtype=self.dtype)

    def start(self, rows: slice, *, two_sums: bool = False) -> None:
        """Start a block of tokens, and a group if the block is its first."""
        self.place = rows.start % max(self.group, 1)
        if self.place:
            return
        self.rows = slice(rows.start, min(rows.start + self.group, self.hidden.shape[0]))
        self.block = self.by_student = None
        if self.d_hidden is None:
            return
        block = self.d_hidden[self.rows]
        self.block = (
            block if block.dtype == self.dtype else torch.zeros_like(block, dtype=self.dtype)
        )
        if two_sums:
            self.by_student = torch.zeros_like(block, dtype=self.dtype)

    def room(self, tile: Tile) -> Tensor | None:
        """The memory for the gradient by the tile's student products; None: overwrite the
        products.
        """
        if self.narrow is None:
            return None
        shape = tile.roles[0].product.shape
        first = self.place * shape[1]
        return self.narrow[first : first + shape.numel()].view(shape)

    def written(self, tile: Tile) -> Tensor:
        """The tensor in which that gradient then is."""
        room = self.room(tile)
        return tile.roles[0].product if room is None else room

    def add(self, tile: Tile, hidden: Tensor) -> None:
        """Add the tile's gradient (for two sums: p and S), which has been written, for tokens with
        hidden [n, D]. In a group of several blocks this waits for the group's end.
        """
        if self.kept:
            return
        self._multiply(self.written(tile), tile.columns, hidden)
        if self.by_student is not None:
            weight = self.head.weight[tile.columns]
            gemm.add_input_gradient_(self.by_student, tile.roles[1].product, weight)

    def _multiply(self, gradient: Tensor, columns: slice, hidden: Tensor) -> None:
        if self.block is not None:
            gemm.add_input_gradient_(self.block, gradient, self.head.weight[columns])
        if self.d_weight is not None:
            product_ = gemm.set_weight_gradient_ if self.once else gemm.add_weight_gradient_
            product_(self.d_weight[columns], gradient, hidden, self.hidden.dtype)
        if self.d_bias is not None:
            self.d_bias[columns] += gradient.sum(0, dtype=self.dtype)

    def finish(
        self,
        rows: slice,
        shards: Shards | None,
        sum_p: Tensor | None = None,
        row_factor: Tensor | None = None,
    ) -> None:
        """Finish a block. After the last of a group: multiply the kept gradients, and sum dh over
        ranks, each of which has a part of the vocabulary. Then join the two sums and scale the rows
        by `row_factor` [n] (both only in groups of one block).
        """
        if rows.stop < self.rows.stop:
            return
        rows = self.rows
        if self.kept:
            assert self.narrow is not None
            shape = rows.stop - rows.start, self.head.weight.shape[0]
            gradient = self.narrow[: shape[0] * shape[1]].view(shape)
            self._multiply(gradient, slice(None), self.hidden[rows])
        if self.d_hidden is None or self.block is None:
            return
        if shards is not None:
            for own in (self.block, self.by_student):
                if own is not None:
                    shards.sum_(own)
        if self.by_student is not None:
            assert sum_p is not None
            self.block.addcmul_(self.by_student, sum_p[:, None], value=-1.0)
        if row_factor is not None:
            self.block *= row_factor[:, None]
        if self.unit is not None:
            self.block /= self.unit
        if self.block.dtype != self.d_hidden.dtype:
            self.d_hidden[rows] = self.block
        self.block = self.by_student = None

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dh [N, D], dW [V, D], dbias [V]) in `gemm.gradient_dtype` of hidden states and head."""
        dtype, head = gemm.gradient_dtype(self.head.weight.dtype), (self.d_weight, self.d_bias)
        if self.unit is not None:
            for gradient in head:
                if gradient is not None:
                    gradient /= self.unit
        d_weight, d_bias = (None if x is None else x.to(dtype) for x in head)
        return self.d_hidden, d_weight, d_bias


def blocks(n_tokens: int, plan: Plan) -> Iterator[slice]:
    """Yield the tokens of each of the plan's blocks, group by group."""
    for start in range(0, n_tokens, max(plan.group, 1)):
        stop = min(start + plan.group, n_tokens)
        for first in range(start, stop, plan.rows):
            yield slice(first, min(first + plan.rows, stop))


def buffers(hidden: Tensor, plan: Plan, roles: int) -> tuple[Tensor, Tensor | None]:
    """(memory for every role's tile, memory for a group's gradients in the operands' dtype, or None
    if products read fp32).
    """
    tile = hidden.new_empty(roles * plan.rows * plan.columns, dtype=gemm.tile_dtype(hidden.dtype))
    return tile, hidden.new_empty(plan.group * plan.columns) if gemm.narrows(hidden) else None
