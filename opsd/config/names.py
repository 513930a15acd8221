"""The names that a config chooses among and that other commands list too. Imports almost nothing,
so that `opsd --help` stays fast."""

from typing import Literal, get_args

Method = Literal["opsd", "grpo", "sft", "distill"]
METHODS: tuple[str, ...] = get_args(Method)

DIVERGENCE_METHODS = ("opsd", "distill")
"""Methods that learn from a divergence between a teacher and the student."""

Policy = Literal["initial", "live", "ema", "model"]
"""Whose weights a teacher has."""

Engine = Literal["generate", "continuous", "vllm", "vllm_server"]
ENGINES: tuple[str, ...] = get_args(Engine)

HOTTEST = 2.0  # vLLM's highest temperature
