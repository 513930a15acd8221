"""Plans how many tokens and vocabulary entries are computed at a time, and the memory that takes.
Pure arithmetic: no tensors, no torch.

One pass: a block of n tokens with all its V logits. They are still there when the gradient is
computed, so the head is multiplied no more often than in the dense form. Two passes: tiles of v < V
entries, which are computed again in every pass, so that n can stay large with little memory.

A block of n tokens on tiles of v entries takes `Cost.bytes(n, v)`, beside the gradients that the
caller asked for. One pass is used if `fast_rows` tokens fit the budget. With fewer, each product
reads the whole head for little work, and 12 products of a large block are faster than 8 of a thin
one (two passes cost 1.5 to 2 times the multiplications). Measured on one AVX-512 core, V = 32768, D
= 512, trainable head, microseconds a token: one pass 8181, 4659, 3719, 2581 with 4, 8, 16, 128
rows; two passes 1.5 times the last: so 16 rows. On a GPU a product needs some 256 rows to be bound
by arithmetic.

Two levels (`Cost.gradient`): gradients that are rounded to 16 bits take a quarter of the two roles'
fp32 logits. So logits are computed a block at a time, and the gradients of a group of many blocks
are kept until one product reads them all: dW [V, D], which in fp32 is larger than a block, is then
read and written once a group instead of once a block.
"""

from dataclasses import dataclass

DEFAULT_BUDGET = 256 * 2**20
LEAST_COLUMNS = 64


@dataclass(frozen=True)
class Cost:
    """The parts of scratch memory, in bytes.

    entry: for each token and vocabulary entry of a tile; temporaries: for each of at most
    `slice_entries` of them; token: for each token; one_pass_token, tiles_token: the same, in only
    one of the algorithms; column: for each of at most `slice_columns` vocabulary entries of a tile;
    gradient: for each token of a group and vocabulary entry of a tile; group_token: for each token
    of a group; fixed: once.
    """

    entry: float
    temporaries: float = 0
    slice_entries: int = 0
    token: int = 0
    one_pass_token: int = 0
    tiles_token: int = 0
    column: int = 0
    slice_columns: int = 0
    gradient: int = 0
    group_token: int = 0
    fixed: int = 0

    def per_token(self, columns: int, one_pass: bool) -> int:
        """Bytes of a block's token, without `temporaries`."""
        token = self.token + (self.one_pass_token if one_pass else self.tiles_token)
        return int(self.entry * columns) + token

    def per_kept_token(self, columns: int) -> int:
        """Bytes of a group's token."""
        return self.gradient * columns + self.group_token

    def bytes(self, rows: int, columns: int, one_pass: bool, group: int | None = None) -> int:
        """Bytes for blocks of `rows` tokens in groups of `group` tokens (None: groups of one
        block).
        """
        entries = min(rows * columns, self.slice_entries)
        return (
            rows * self.per_token(columns, one_pass)
            + (rows if group is None else group) * self.per_kept_token(columns)
            + int(self.temporaries * entries)
            + self.column * min(columns, self.slice_columns)
            + self.fixed
        )

    def most_rows(self, columns: int, one_pass: bool, budget: int) -> int:
        """The largest n for which `bytes` fits the budget, with groups of one block; 0 if none
        does.
        """
        left = budget - self.bytes(0, columns, one_pass)
        token = self.per_token(columns, one_pass) + self.per_kept_token(columns)
        unsliced = int(left / (token + self.temporaries * columns))
        sliced = (left - int(self.temporaries * self.slice_entries)) // token
        return max(unsliced, sliced, 0)


@dataclass(frozen=True)
class Plan:
    """The tokens in a block, the number of blocks, the vocabulary entries in a tile, the bytes of
    scratch memory in use at once, the tokens in a group, and the number of groups.
    """

    rows: int
    blocks: int
    columns: int
    one_pass: bool
    bytes: int
    group: int
    groups: int


def plan(
    tokens: int,
    vocabulary: int,
    cost: Cost,
    *,
    budget: int | None = None,
    fast_rows: int = 16,
    fast_columns: int = 512,
    grouped: bool = False,
) -> Plan:
    """Split `tokens` into equal blocks, and the vocabulary into tiles if necessary, within `budget`
    bytes (None: 256 MiB, or the least that works if that is more).

    Tiles have `fast_columns` entries. They are wider if all tokens fit into one block, and narrower
    if a block would have fewer rows than a tile has columns. `grouped`: with one pass, use blocks
    of `fast_rows` and as large a group as fits. Raises ValueError if not even one token fits.
    """
    least_columns = min(vocabulary, LEAST_COLUMNS)
    least = cost.bytes(1, least_columns, least_columns == vocabulary)
    if budget is None:
        budget = max(DEFAULT_BUDGET, least)
    if budget < least:
        raise ValueError(
            f"memory_budget: got {budget} bytes, must be at least {least} "
            f"(one token and {least_columns} logits)"
        )
    rows = cost.most_rows(vocabulary, True, budget)
    if rows >= min(tokens, fast_rows) or vocabulary == least_columns:
        if grouped and fast_rows < rows < tokens:
            left = budget - cost.bytes(fast_rows, vocabulary, True, 0)
            return _grouped(
                tokens, fast_rows, left // cost.per_kept_token(vocabulary), cost, vocabulary
            )
        return _even(tokens, min(rows, tokens), vocabulary, True, cost)
    columns = min(fast_columns, vocabulary - 1)
    rows = cost.most_rows(columns, False, budget)
    while rows < min(tokens, columns) and columns > least_columns:
        columns = max(columns // 2, least_columns)
        rows = cost.most_rows(columns, False, budget)
    while columns < vocabulary - 1 and cost.most_rows(2 * columns, False, budget) >= tokens:
        columns = min(2 * columns, vocabulary - 1)
    rows = cost.most_rows(columns, False, budget)
    return _even(tokens, min(rows, tokens), columns, False, cost)


def _even(tokens: int, most: int, columns: int, one_pass: bool, cost: Cost) -> Plan:
    """Plan blocks of at most `most` tokens, each a group of its own."""
    blocks = -(-tokens // most) if tokens else 0
    rows = -(-tokens // blocks) if tokens else 0
    size = cost.bytes(rows, columns, one_pass) if tokens else 0
    return Plan(rows, blocks, columns, one_pass, size, rows, blocks)


def _grouped(tokens: int, most_rows: int, most: int, cost: Cost, columns: int) -> Plan:
    """Plan groups of at most `most` tokens, with blocks of at most `most_rows`; one pass."""
    groups = -(-tokens // most)
    group = -(-tokens // groups)
    rows = -(-group // -(-group // most_rows))
    full, rest = divmod(tokens, group)
    blocks = full * -(-group // rows) + -(-rest // rows)
    size = cost.bytes(rows, columns, True, group)
    return Plan(rows, blocks, columns, True, size, group, groups)
