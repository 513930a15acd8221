"""A model's generation_config.json: its stop tokens are used, its ways of drawing are not.

How rollouts are drawn is said by the run's config alone: a repetition penalty or beams that a model
ships would draw from another distribution than the one that is scored. The file itself is kept for
the trained model, and mended where transformers would refuse to write it.
"""

import copy
import re

from transformers import GenerationConfig, PreTrainedModel

TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id")
NO_WAY_OF_DRAWING = {*TOKENS, "use_cache", "transformers_version", "_from_model_config"}


def keep_stop_tokens(model: PreTrainedModel) -> list[str]:
    """Leave the stop tokens alone in `model.generation_config`; returns the fields left out.

    What the model shipped is kept, mended, as `model.shipped_generation_config`.
    """
    shipped = model.generation_config
    tokens = {name: getattr(shipped, name, None) for name in TOKENS}
    model.shipped_generation_config = mended(shipped)
    model.generation_config = GenerationConfig(**tokens)
    return sorted(shipped.to_diff_dict().keys() - NO_WAY_OF_DRAWING)


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
