"""A model's generation_config.json: its stop tokens are used, its sampling settings are not.

Only the run's config says how rollouts are sampled: with a model's own repetition penalty or beams
they would not come from the distribution that is scored. The file is saved with the trained model,
and corrected where transformers would refuse to write it.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id")
OTHERS = {*TOKENS, "use_cache", "transformers_version", "_from_model_config"}
"""Fields that do not change how tokens are sampled."""


def keep_stop_tokens(model: PreTrainedModel) -> None:
    """Remove all but the special tokens' ids from `model.generation_config`.

    The model's own config is kept, corrected, as `model.shipped_generation_config`.
    """
    holder: Any = model  # by torch's types a module has only tensors and modules as attributes
    holder.own_generation_config = holder.generation_config
    holder.shipped_generation_config = shipped = mended(holder.generation_config)
    tokens = {name: getattr(shipped, name, None) for name in TOKENS}
    holder.generation_config = GenerationConfig(**tokens)


def left_out(model: PreTrainedModel) -> str | None:
    """A sentence about the model's own sampling settings, which are not used; None without any."""
    own, saved = (
        config.to_diff_dict() if config is not None else {}
        for config in (getattr(model, f"{k}_generation_config", None) for k in ("own", "shipped"))
    )
    on = {name: value for name, value in own.items() if value is not False}
    told = [f"{name} {value}" for name, value in sorted(on.items()) if name not in OTHERS]
    if not told:
        return None
    changed = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
    more = f"; it is saved with another {' and '.join(changed)}, or it would be invalid"
    return (
        f"The model's generation_config.json says {', '.join(told)}: rollouts and evaluations do "
        f"not use it, the run's config alone says how they are drawn{more if changed else ''}"
    )


@contextmanager
def generating_by(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """A context in which the model has this generation config. With an empty one, `generate` uses
    its caller's arguments only."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def as_shipped(model: PreTrainedModel):
    """A context in which the model has the generation config that it came with, to save it."""
    shipped = getattr(model, "shipped_generation_config", None)
    return generating_by(model, mended(model.generation_config) if shipped is None else shipped)


def mended(config: GenerationConfig) -> GenerationConfig:
    """Correct the config so that transformers writes it: set `do_sample` where it has a
    temperature, and remove fields that are invalid even then."""
    if _problems(config) is None:
        return config
    config = copy.deepcopy(config)
    config.do_sample = True
    while (problems := _problems(config)) is not None:
        named = re.findall(r"^- `(\w+)`", problems, re.MULTILINE)
        if not any(getattr(config, name, None) is not None for name in named):
            return GenerationConfig(**{name: getattr(config, name, None) for name in TOKENS})
        for name in named:
            setattr(config, name, None)
    return config


def _problems(config: GenerationConfig) -> str | None:
    try:
        config.validate(strict=True)
    except Exception as error:  # damaged values raise errors of any type
        return str(error)
    return None
