"""How many tokens to work on at a time, and what that costs. Pure arithmetic: no tensors, no torch.

A block of n tokens needs, beside the gradients that the caller asked for,

    n * rows of V logits (both roles, plus what the backend needs to work on them) + n copied hidden
    states + fixed

bytes. The largest n that fits the budget is taken, since large GEMMs are fast ones; it is then
evened out over the blocks.
"""

from dataclasses import dataclass

DEFAULT_BUDGET = 256 * 2**20


@dataclass(frozen=True)
class Plan:
    """Tokens a block, the number of blocks, and the bytes of scratch memory that one block
    occupies.
    """

    rows: int
    blocks: int
    bytes: int


def plan_rows(
    tokens: int,
    vocabulary: int,
    *,
    tiles: float,
    item_bytes: int = 4,
    row_bytes: int = 0,
    fixed_bytes: int = 0,
    budget: int | None = None,
) -> Plan:
    """Split `tokens` into blocks of equal size that fit `budget` bytes (None: 256 MiB, or one row
    where that is more).

    tiles: rows of V items of `item_bytes` that one token occupies; row_bytes: its other bytes
    (copied hidden states); fixed_bytes: what is needed once. Raises ValueError where not even one
    token fits.
    """
    per_row = int(tiles * vocabulary * item_bytes) + row_bytes
    least = per_row + fixed_bytes
    if budget is None:
        budget = max(DEFAULT_BUDGET, least)
    if budget < least:
        raise ValueError(
            f"memory_budget: got {budget} bytes, must be at least {least} "
            f"(one token of {vocabulary} logits)"
        )
    if tokens == 0:
        return Plan(rows=0, blocks=0, bytes=0)
    most = min(tokens, (budget - fixed_bytes) // per_row)
    blocks = -(-tokens // most)
    rows = -(-tokens // blocks)
    return Plan(rows=rows, blocks=blocks, bytes=rows * per_row + fixed_bytes)
