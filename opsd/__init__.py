"""On-policy self-distillation: a language model learns from itself, shown the solution.

`from opsd import …` offers what a training script needs; examples/minimal_loop.py is one. A name is
imported when it is first asked for, so that `import opsd` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opsd.common.errors import UserError
    from opsd.config.config import Config as OPSDConfig
    from opsd.config.load import load_config, parse_config
    from opsd.data.prompts import Context, Prompts
    from opsd.data.rows import Row, load_rows, split_rows
    from opsd.grading.grader import Grade, Grader
    from opsd.models.head import head_arguments
    from opsd.models.load import load_model, stop_ids
    from opsd.prefix import shared_prefix_hidden_states
    from opsd.rollout import GenerateSampler, Rollout, Sampling
    from opsd.rollout.base import decode
    from opsd.training.api import OPSDTrainer
    from opsd.training.load_data import load_data
    from opsd.training.run import train
    from opsd_kernels import Clip, linear_divergence, linear_log_prob

__version__ = "0.1.0"

__all__ = [
    "Clip", "Context", "GenerateSampler", "Grade", "Grader", "OPSDConfig", "OPSDTrainer",
    "Prompts", "Rollout", "Row", "Sampling", "UserError", "decode", "head_arguments",
    "linear_divergence", "linear_log_prob", "load_config", "load_data", "load_model", "load_rows",
    "parse_config", "shared_prefix_hidden_states", "split_rows", "stop_ids", "train",
]  # fmt: skip

HOMES = {
    "opsd.common.errors": ("UserError",),
    "opsd.config.config": ("OPSDConfig",),
    "opsd.config.load": ("load_config", "parse_config"),
    "opsd.data.prompts": ("Context", "Prompts"),
    "opsd.data.rows": ("Row", "load_rows", "split_rows"),
    "opsd.grading.grader": ("Grade", "Grader"),
    "opsd.models.head": ("head_arguments",),
    "opsd.models.load": ("load_model", "stop_ids"),
    "opsd.prefix": ("shared_prefix_hidden_states",),
    "opsd.rollout": ("GenerateSampler", "Rollout", "Sampling"),
    "opsd.rollout.base": ("decode",),
    "opsd.training.api": ("OPSDTrainer",),
    "opsd.training.load_data": ("load_data",),
    "opsd.training.run": ("train",),
    "opsd_kernels": ("Clip", "linear_divergence", "linear_log_prob"),
}
"""Where the public names come from."""

_HOME = {name: module for module, names in HOMES.items() for name in names}
_OTHERWISE = {"OPSDConfig": "Config"}  # there


def __getattr__(name: str) -> Any:
    if name.endswith(("Trainer", "Config")) and name not in _HOME:  # Python hides an AttributeError
        said = "OPSDTrainer and OPSDConfig have all methods, as in OPSDConfig(method='grpo')"
        raise ImportError(f"cannot import name {name!r} from 'opsd': {said}")
    if name not in _HOME:
        raise AttributeError(f"module 'opsd' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), _OTHERWISE.get(name, name))
    globals()[name] = value  # the next time it is simply there
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
