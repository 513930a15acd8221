"""What to change so that a run fits a given memory, the changes that cost least first."""

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
"""(kind, what to tell the user, the config's fields)"""


def changes(config: Config, longest: int, on_gpu: bool) -> Iterator[Change]:
    """Changes to try in this order, each in addition to those before; one replaces an earlier one
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
    """The mildest changes that bring the peak below `memory` bytes, none of which can be left out.

    A change that does not go with what the user has set is no choice. `tried_one` is called for
    each trial. Returns the changes in words, as overrides, and made (which may not suffice).
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
        # The first so many levels: none, the mildest, …
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
    """The config with the last change of each kind made."""
    values = config.model_dump()
    for tried in levels.values():
        for _, _, fields in tried[-1:]:
            values = merge(values, fields)
    return parse_config(values)
