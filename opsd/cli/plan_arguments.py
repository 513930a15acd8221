"""The arguments of `opsd plan`. They are checked before torch is imported."""

import argparse
import gc
import re

from opsd.cli.arguments import check_at_least
from opsd.common.errors import UserError
from opsd.plan.gpus import GPUS

_UNITS = {"GB": 1e9, "GIB": 2**30, "MB": 1e6, "MIB": 2**20}


def add_arguments(parser: argparse.ArgumentParser) -> None:
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


def run(parsed: argparse.Namespace) -> None:
    """Shows the plan. Raises UserError."""
    check(parsed)
    gc.disable()  # a sixth of its time, most of it imports, went to collections that find little
    try:
        from opsd.cli.plan import plan_command
        from opsd.models.load import quiet_transformers

        quiet_transformers()
        plan_command(parsed)
    finally:
        gc.enable()


def check(parsed: argparse.Namespace) -> None:
    """Checks the arguments; `memory` becomes bytes, `gpu` a name in GPUS. Raises UserError."""
    if parsed.gpu is not None and parsed.gpu.lower() not in GPUS:
        raise UserError(f"--gpu is {parsed.gpu!r}: it must be one of {', '.join(GPUS)}")
    check_at_least(1, parsed, "gpus", "prompt_tokens", "solution_tokens")
    parsed.gpu = parsed.gpu and parsed.gpu.lower()
    if (text := parsed.memory) is not None:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB|MB|MiB)\s*", text, re.IGNORECASE)
        if match is None or float(match[1]) == 0:
            raise UserError(f"--memory is {text!r}: it must be a size such as 24GB")
        parsed.memory = float(match[1]) * _UNITS[match[2].upper()]
