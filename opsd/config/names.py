"""Names of methods, engines and policies, for the config and the commands. Imports almost nothing,
so that `opsd --help` stays fast."""

from typing import Literal, get_args

Method = Literal["opsd", "grpo", "sft", "distill"]
METHODS: tuple[str, ...] = get_args(Method)

DIVERGENCE_METHODS = ("opsd", "distill")
"""Methods that minimise a divergence between teacher and student."""

Policy = Literal["initial", "live", "ema", "model"]
"""A teacher's weights: the student's at step 0 or now, their moving average, another model's."""

Engine = Literal["generate", "continuous", "vllm", "vllm_server", "sglang_server"]
ENGINES: tuple[str, ...] = get_args(Engine)

SERVERS = {"vllm_server": "http://localhost:8000", "sglang_server": "http://localhost:30000"}
"""Engines over HTTP → the usual address."""

HOTTEST = 2.0  # the highest temperature that vLLM accepts
