"""A model's generation_config.json: its stop tokens are used, its ways of drawing are not.

How rollouts are drawn is said by the run's config alone: a repetition penalty or beams that a model
ships would draw from another distribution than the one that is scored. The file itself is kept for
the trained model, and mended where transformers would refuse to write it.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id")
OTHERS = {*TOKENS, "use_cache", "transformers_version", "_from_model_config"}
"""Fields that say nothing of how tokens are drawn."""


def keep_stop_tokens(model: PreTrainedModel) -> None:
    """Leave the stop tokens alone in `model.generation_config`.

    What the model shipped is kept as `model.shipped_generation_config`, mended.
    """
    holder: Any = model  # torch's types say that a module holds tensors and modules alone
    holder.shipped_generation_config = shipped = mended(holder.generation_config)
    tokens = {name: getattr(shipped, name, None) for name in TOKENS}
    holder.generation_config = GenerationConfig(**tokens)


def left_out(model: PreTrainedModel) -> str | None:
    """What to tell of the ways of drawing that a model ships and nobody uses; None without any."""
    shipped = getattr(model, "shipped_generation_config", None)
    fields = shipped.to_diff_dict() if shipped is not None else {}
    on = {name: value for name, value in fields.items() if value is not False}
    told = [f"{name} {value}" for name, value in sorted(on.items()) if name not in OTHERS]
    if not told:
        return None
    return (
        f"The model's generation_config.json says {', '.join(told)}: rollouts and evaluations do "
        "not use it, the run's config alone says how they are drawn"
    )


@contextmanager
def generating_by(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """The model with this generation config; an empty one fills in nothing that a caller of
    `generate` leaves open."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def as_shipped(model: PreTrainedModel):
    """The model with the generation config that it shipped, to be written; or its own."""
    shipped = getattr(model, "shipped_generation_config", None)
    return generating_by(model, mended(model.generation_config) if shipped is None else shipped)


def mended(config: GenerationConfig) -> GenerationConfig:
    """The config as transformers writes it: with `do_sample` where it has a temperature, and
    without the fields that are invalid all the same."""
    if _problems(config) is None:
        return config
    config = copy.deepcopy(config)
    config.do_sample = True
    while (problems := _problems(config)) is not None:
        named = [name for name in re.findall(r"^- `(\w+)`", problems, re.MULTILINE)]
        if not any(getattr(config, name, None) is not None for name in named):
            return GenerationConfig(**{name: getattr(config, name, None) for name in TOKENS})
        for name in named:
            setattr(config, name, None)
    return config


def _problems(config: GenerationConfig) -> str | None:
    try:
        config.validate(strict=True)
    except Exception as error:  # what a damaged value provokes
        return str(error)
    return None
