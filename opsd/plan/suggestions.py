"""Find changes that make a run fit into a given memory, the least costly ones first."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator

from opsd.common.errors import UserError
from opsd.config.config import Config
from opsd.config.load import merge, parse_config
from opsd.plan.memory import Planner

MIB = 2**20
Change = tuple[str, str, dict]
"""(kind, description for the user, the config fields to set)"""


def changes(config: Config, longest: int, on_gpu: bool) -> Iterator[Change]:
    """Yield changes to try, in this order and all together; a later change replaces an earlier one
    of the same kind.

    longest: tokens of the longest sequence. A micro-batch always holds at least one sequence.
    """
    train, rollout, test = config.train, config.rollout, config.eval
    budget = config.loss.memory_budget
    if budget is None or budget > 256 * MIB:
        yield "budget", "logits budget 256 MB", {"loss": {"memory_budget": 256 * MIB}}
    size = max(rollout.batch_size, test.batch_size)
    while size > 8:
        size //= 2
        parts = (("rollout", rollout), ("eval", test))
        sizes = {name: {"batch_size": min(size, part.batch_size)} for name, part in parts}
        yield "sampling", f"{size} sequences sampled at once", sizes
    tokens = train.micro_batch_tokens
    while tokens > max(longest, 1024):
        tokens = max(tokens // 2, longest, 1024)
        fields = {"train": {"micro_batch_tokens": tokens}}
        yield "micro-batch", f"micro-batches of {tokens:,} tokens", fields
    if not train.gradient_checkpointing:
        yield "checkpoints", "gradient checkpointing", {"train": {"gradient_checkpointing": True}}
    lora = config.model.lora
    if lora is None:
        yield "adapters", "LoRA", {"model": {"lora": {}}}
    if on_gpu and (lora is None or lora.quantize == "none"):
        yield "adapters", "QLoRA", {"model": {"lora": {"quantize": "nf4"}}}


def fit(
    config: Config, memory: float, longest: int, planner: Planner, tried_one: Callable[[], None]
) -> tuple[list[str], list[str], Config]:
    """Find the mildest changes that bring the peak below `memory` bytes, none of them superfluous.

    Skips changes that make the user's config invalid. Calls `tried_one` for each trial. Returns the
    changes in words, as overrides, and the changed config, which still may not fit.
    """

    def peak(levels: dict[str, list[Change]]) -> float:
        tried_one()
        try:
            return planner.memory(changed(config, levels)).peak
        except UserError:
            return math.inf

    levels: dict[str, list[Change]] = {}
    for change in changes(config, longest, planner.device_memory is not None):
        more = {**levels, change[0]: [*levels.get(change[0], []), change]}
        needed = peak(more)
        if needed < math.inf:
            levels = more
        if needed <= memory:
            break
    for kind, tried in list(levels.items()):
        # Try fewer levels of this kind: none, only the mildest, …
        milder = ({**levels, kind: tried[:count]} for count in range(len(tried)))
        levels = next((fewer for fewer in milder if peak(fewer) <= memory), levels)
    made = [tried[-1] for tried in levels.values() if tried]
    overrides = [
        f"{section}.{name}={json.dumps(value)}"
        for _, _, fields in made
        for section, values in fields.items()
        for name, value in values.items()
    ]
    return [words for _, words, _ in made], overrides, changed(config, levels)


def changed(config: Config, levels: dict[str, list[Change]]) -> Config:
    """A copy of the config with the last change of each kind. Raises UserError if it is invalid."""
    values = config.model_dump()
    for tried in levels.values():
        for _, _, fields in tried[-1:]:
            values = merge(values, fields)
    return parse_config(values)
