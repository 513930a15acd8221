"""A block of tokens against the vocabulary, tile by tile: products in, gradients out.

    for tile in sweep:                       # h W^T of every role for [n tokens, v entries]
        backend.some_function(*tile.roles, ...)
        gradients.add(tile)                  # dh += G W, dW += G^T h

A sweep whose tile is as wide as the vocabulary computes its products once, and later passes find
them where they are: that is all the difference between one pass and two.

Shapes: n tokens of a block, N of a call, V vocabulary entries (this rank's, where they are split
over ranks), v of a tile, D hidden width.
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


@dataclass(frozen=True)
class Head:
    """weight [V, D] and bias [V] of a role."""

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
    """A block of tokens against some columns of the vocabulary."""

    columns: slice
    roles: tuple[Logits, ...]  # the student's first


def plan_call(
    hidden: tuple[Tensor, ...],
    heads: tuple[Head, ...],
    backend,
    *,
    two_sums: bool,
    vocabulary: int,
    budget: int | None,
) -> Plan:
    """The plan of a call. `two_sums`: whether two passes take dh as two sums (see `Gradients`);
    `vocabulary`: V, or the largest shard's.
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
    # Also where only backward will want it, which runs the call again within the same budget.
    wide_gradient = gemm.gradient_dtype(first.dtype) != dtype
    cost = Cost(
        entry=len(heads) * item + (first.element_size() if gemm.narrows(first) else 0),
        temporaries=temporaries * item,
        slice_entries=getattr(backend, "slice_entries", lambda device: 2**62)(first.device),
        token=states.ROWS * item + widened + (width * item if wide_gradient else 0),
        one_pass_token=stacked,
        tiles_token=width * item if two_sums else 0,
        column=max(h.weight.shape[1] for h in heads) * item if widened else 0,
        slice_columns=gemm.SLICE,
    )
    if budget is None and on_gpu:
        budget = max(GPU_BUDGET, cost.bytes(1, vocabulary, True))
    fast = {"fast_rows": 256, "fast_columns": 4096} if on_gpu else {}
    return plan(first.shape[0], vocabulary, cost, budget=budget, **fast)


def _share(heads: tuple[Head, ...]) -> bool:
    return len(heads) == 2 and heads[0].weight is heads[1].weight


class Sweep:
    """The products of one block of tokens, `columns` vocabulary entries at a time."""

    def __init__(
        self, hidden: tuple[Tensor, ...], heads: tuple[Head, ...], columns: int, buffer: Tensor
    ) -> None:
        """hidden: [n, D] of each role; buffer: room for every role's [n, columns]."""
        self.rows, self.vocabulary = hidden[0].shape[0], heads[0].weight.shape[0]
        self.columns, self.heads, self.buffer = columns, heads, buffer
        self.hidden = self._operands(hidden)
        self.whole_tile: Tile | None = None

    def _operands(self, hidden: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """As the products take them; one below the other where one product serves both roles, so
        that a shared head is read once.
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
        """[n, D], as operand of dW."""
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
    """Those of the student's hidden states and head, summed over tiles and blocks in fp32.

    dh of a block may come as two sums, A = sum_v p W_v and B = sum_v S W_v, and then
    dh = A - (sum p) B, where the sum is known only after the last tile.
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
        """hidden: [N, D] of the call. narrow: room for a tile in the operands' dtype. unit: what
        the tiles' gradients are multiplied by, see `gemm.gradient_unit`.
        """
        self.head, self.narrow, self.operand = head, narrow, hidden.dtype
        self.dtype = gemm.tile_dtype(hidden.dtype)
        weight = head.weight
        self.once = plan.blocks <= 1  # dW is then complete tile by tile
        self.unit = unit
        kept_in = gemm.gradient_dtype(hidden.dtype)
        self.d_hidden = torch.zeros_like(hidden, dtype=kept_in) if want.hidden else None
        self.d_weight = self.d_bias = None
        if want.weight:
            summed_in = gemm.gradient_dtype(weight.dtype) if self.once else self.dtype
            new = torch.empty_like if plan.blocks == 1 else torch.zeros_like
            self.d_weight = new(weight, dtype=summed_in)
        if want.bias:
            self.d_bias = weight.new_zeros(weight.shape[0], dtype=self.dtype)

    def start(self, rows: slice, *, two_sums: bool) -> None:
        """A new block of tokens."""
        self.block = self.by_student = None
        if self.d_hidden is None:
            return
        block = self.d_hidden[rows]
        self.block = (
            block if block.dtype == self.dtype else torch.zeros_like(block, dtype=self.dtype)
        )
        if two_sums:
            self.by_student = torch.zeros_like(block, dtype=self.dtype)

    def add(self, tile: Tile, hidden: Tensor) -> None:
        """`tile` holds gradients by the products (for two sums: p and S); hidden [n, D] their
        tokens.
        """
        products = [logits.product for logits in tile.roles]
        gradient = self._narrowed(products[0])
        weight = self.head.weight[tile.columns]
        if self.block is not None:
            gemm.add_input_gradient_(self.block, gradient, weight)
        if self.d_weight is not None:
            product_ = gemm.set_weight_gradient_ if self.once else gemm.add_weight_gradient_
            product_(self.d_weight[tile.columns], gradient, hidden, self.operand)
        if self.d_bias is not None:
            self.d_bias[tile.columns] += products[0].sum(0)
        if self.by_student is not None:
            gemm.add_input_gradient_(self.by_student, self._narrowed(products[1]), weight)

    def combine(self, shards: Shards) -> None:
        """dh of the block is the sum over all ranks, which have a piece of the vocabulary each."""
        for own in (self.block, self.by_student):
            if own is not None:
                shards.sum_(own)

    def finish(self, rows: slice, sum_p: Tensor | None, row_factor: Tensor | None) -> None:
        """The block's dh is complete: join the two sums, scale the rows by `row_factor` [n]."""
        if self.d_hidden is None or self.block is None:
            return
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

    def _narrowed(self, gradient: Tensor) -> Tensor:
        if self.narrow is None:
            return gradient
        return self.narrow[: gradient.numel()].view(gradient.shape).copy_(gradient)


def blocks(n_tokens: int, plan: Plan) -> Iterator[slice]:
    """The tokens of each of the plan's blocks."""
    for start in range(0, n_tokens, max(plan.rows, 1)):
        yield slice(start, min(start + plan.rows, n_tokens))


def buffers(hidden: Tensor, plan: Plan, roles: int) -> tuple[Tensor, Tensor | None]:
    """(room for every role's tile, room for one in the operands' dtype where products need it)."""
    entries = plan.rows * plan.columns
    tile = hidden.new_empty(roles * entries, dtype=gemm.tile_dtype(hidden.dtype))
    return tile, hidden.new_empty(entries) if gemm.narrows(hidden) else None
