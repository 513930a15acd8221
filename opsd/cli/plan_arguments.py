"""The arguments of `opsd plan`. They are checked before torch is imported."""

import gc
import re
from argparse import ArgumentParser, Namespace

from opsd.common.errors import UserError
from opsd.plan.gpus import GPUS

_UNITS = {"GB": 1e9, "GIB": 2**30, "MB": 1e6, "MIB": 2**20}


def add_arguments(parser: ArgumentParser) -> None:
    """The command line of `opsd plan`."""
    add = parser.add_argument
    add("model", metavar="MODEL_OR_CONFIG", help="a directory, config.json, known name, or .yaml")
    add("overrides", nargs="*", metavar="section.field=value", help="as for opsd train")
    add("--gpu", metavar="NAME", help=f"{', '.join(GPUS)}; none: a CPU")
    add("--gpus", type=int, default=1, metavar="N", help="processes, with a GPU each (default: 1)")
    add("--memory", metavar="SIZE", help="what to change to fit into 24GB, say")
    add("--prompt-tokens", type=int, default=200, metavar="N", help="of a problem (default: 200)")
    add(
        "--solution-tokens",
        type=int,
        default=1000,
        metavar="N",
        help="of a solution beside it, in the teacher's prompt (default: 1000)",
    )
    add("--json", action="store_true", help="the plan as JSON")


def run(parsed: Namespace) -> None:
    """Shows the plan. Raises UserError."""
    wanted = asked(parsed)
    gc.disable()  # a sixth of its time, most of it imports, went to collections that find little
    try:
        from opsd.cli.plan import plan_command
        from opsd.models.load import quiet_transformers

        quiet_transformers()
        plan_command(wanted)
    finally:
        gc.enable()


def asked(parsed: Namespace) -> Namespace:
    """The arguments, checked; gpu None: a CPU. Raises UserError."""
    gpu = None if parsed.gpu is None else parsed.gpu.lower()
    if gpu is not None and gpu not in GPUS:
        raise UserError(f"--gpu is {parsed.gpu!r}: it must be one of {', '.join(GPUS)}")
    for name in ("gpus", "prompt_tokens", "solution_tokens"):
        value = getattr(parsed, name)
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    return Namespace(**{**vars(parsed), "gpu": gpu, "memory": _bytes(parsed.memory)})


def _bytes(text: str | None) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB|MB|MiB)\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise UserError(f"--memory is {text!r}: it must be a size such as 24GB")
    return float(match[1]) * _UNITS[match[2].upper()]
