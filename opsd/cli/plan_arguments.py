"""The arguments of `opsd plan`, which are checked before torch is imported."""

import argparse
import json
import re
import sys

from opsd.common.errors import UserError
from opsd.common.format import size
from opsd.common.near import nearest
from opsd.config.compatibility import refused
from opsd.config.config import Config
from opsd.config.load import load_config, parse_config, with_overrides
from opsd.plan.gpus import GPU, GPUS, find_gpu
from opsd.plan.known_models import check_window, known_window

WORDS = {"gpus": ", ".join(GPUS)}
_UNITS = {"G": 1e9, "GB": 1e9, "GIB": 2**30, "M": 1e6, "MB": 1e6, "MIB": 2**20}


def run(parsed: argparse.Namespace) -> None:
    """Shows the plan. Raises UserError."""
    check(parsed)
    from opsd.cli.first_look import check_model, import_torch
    from opsd.common.display import Display

    config = _config(parsed)
    if config.model.gguf_file is None and not config.model.path.endswith(".json"):
        check_model(config.model.path, "model.path")
    lengths = parsed.prompt_tokens, parsed.solution_tokens, config.rollout.max_new_tokens
    check_window(*lengths, known_window(config.model))
    if config.rollout.engine == "vllm" and parsed.gpu is None:
        raise refused(config, "rollout.engine: name the GPU with --gpu")
    if config.train.sharding != "none" and parsed.gpus == 1:
        raise refused(config, "train.sharding: give the number of GPUs with --gpus")
    display = Display(file=sys.stderr if parsed.json else None)
    import_torch(display)
    from opsd.cli.plan import plan_command

    plan_command(parsed, config, display)


def _config(parsed: argparse.Namespace) -> Config:
    """The config, or the default settings for a model."""
    if parsed.model.endswith((".yaml", ".yml")):
        return load_config(parsed.model, parsed.overrides)
    overrides = [f"model.path={json.dumps(parsed.model)}", "data.source=none", *parsed.overrides]
    return parse_config(with_overrides({}, overrides))


def check(parsed: argparse.Namespace) -> None:
    """Checks the arguments; turns `memory` into bytes and `gpu` into a GPU. Raises UserError."""
    if find_gpu(named := str(parsed.gpus)):
        raise UserError(f"--gpus is {named}: it counts them; did you mean --gpu {named}?")
    if parsed.gpu is not None:
        parsed.gpu, count = machine_of(parsed.gpu, "--gpu")
        parsed.gpus = max(parsed.gpus, count)
    if (text := parsed.memory) is not None and (memory := _bytes(text)) is None:
        raise UserError(f"--memory is {text!r}: it must be a size such as 24GB")
    parsed.memory = memory if text is not None else None


def gpu_of(text: str, option: str = "--gpu") -> GPU:
    """Returns a known GPU by name, or an unnamed one by its memory. Raises UserError."""
    if found := find_gpu(text):
        return found
    if (memory := _bytes(text)) and not re.fullmatch(r"\d{4}", text):  # a card that is not here
        return GPU(memory, 0, 0, f"GPU of {size(memory)}")
    near = nearest(re.sub(r"^(rtx|gtx|nvidia)[\s_-]*", "", text.lower()), GPUS, cutoff=0.7)
    digits = [sorted(re.sub(r"\D", "", name)) for name in (text, near or "")]
    if len(digits[0]) > 2 and digits[0] != digits[1]:  # a 2080 is no 4080
        near = None
    hint = (
        f"; did you mean {near!r}?" if near else f"; another is named by its memory: {option} 12G"
    )
    raise UserError(
        f"{option} is {text!r}: it must be one of {', '.join(GPUS)}, or a size such as 24GB{hint}"
    )


def machine_of(text: str, option: str) -> tuple[GPU, int]:
    """Reads `h200x2`, or `2xh200`, as a GPU and how many of it. Raises UserError."""
    after = re.fullmatch(r"(.*\d.*?) ?[x:*] ?([1-9]\d*)", text := text.strip(" ,;"), re.I)
    before = re.fullmatch(r"([1-9]\d*) ?[x*] ?(.+)", text, re.I)
    name, count = after.groups() if after else (text, "1")
    if before and not find_gpu(name):  # 4090x2 is not 4090 of 2 GB
        count, name = before.groups()
    return gpu_of(name, option), int(count)


def _bytes(text: str) -> float | None:
    """Reads `24GB`, `24G` and `24` as 24e9 bytes; returns None for what is no size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(G|GB|GiB|M|MB|MiB|)\s*", text, re.IGNORECASE)
    return float(match[1]) * _UNITS[match[2].upper() or "GB"] or None if match else None
