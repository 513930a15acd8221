"""What to change so that a run fits a given memory: the changes that cost least come first."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from opsd.config import Config, parse_config
from opsd.plan.memory import Memory
from opsd.quickstart.recipe import merge

MIB = 2**20
Change = tuple[str, str, dict]
"""(kind, what to tell the user, the config's fields)"""


def changes(config: Config, longest: int) -> Iterator[Change]:
    """What to try one after the other, each in addition to those before; one of a kind replaces
    what came before of that kind.

    longest: tokens of the longest sequence; smaller micro-batches hold one sequence all the same.
    """
    train, rollout, held = config.train, config.rollout, config.eval
    budget = config.loss.memory_budget
    if budget is None or budget > 256 * MIB:
        yield "budget", "logits budget 256 MB", {"loss": {"memory_budget": 256 * MIB}}
    size = max(rollout.batch_size, held.batch_size)
    while size > 8:
        size //= 2
        sizes = {
            "rollout": {"batch_size": min(size, rollout.batch_size)},
            "eval": {"batch_size": min(size, held.batch_size)},
        }
        yield "sampling", f"{size} sequences sampled at once", sizes
    tokens = train.micro_batch_tokens
    while tokens > max(longest, 1024):
        tokens = max(tokens // 2, longest, 1024)
        fields = {"train": {"micro_batch_tokens": tokens}}
        yield "micro-batch", f"micro-batches of {tokens:,} tokens", fields
    if not train.gradient_checkpointing:
        fields = {"train": {"gradient_checkpointing": True}}
        yield "checkpointing", "gradient checkpointing", fields


def fit(
    config: Config, memory: float, longest: int, plan: Callable[[Config], Memory]
) -> tuple[list[str], Config, Memory]:
    """The changes that bring the peak below `memory` bytes and of which none can be left out: what
    they are, the changed config, and its memory (which may still be too much).
    """
    taken: dict[str, Change] = {}
    for change in changes(config, longest):
        if plan(changed(config, taken)).peak <= memory:
            break
        taken[change[0]] = change
    for kind in list(taken):
        fewer = {other: change for other, change in taken.items() if other != kind}
        if plan(changed(config, fewer)).peak <= max(memory, plan(changed(config, taken)).peak):
            taken = fewer
    after = changed(config, taken)
    return [what for _, what, _ in taken.values()], after, plan(after)


def changed(config: Config, taken: dict[str, Change]) -> Config:
    """The config with these changes made."""
    values = config.model_dump()
    for _, _, fields in taken.values():
        values = merge(values, fields)
    return parse_config(values)
