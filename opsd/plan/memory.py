"""A run's memory by part: what is always there, what a step adds, what sampling adds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from opsd.config import Config
from opsd.needs import scores_by_teacher
from opsd.objectives import GRPO, OPSD, SFT, Distill, Sample, Totals
from opsd.plan.architectures import architecture
from opsd.plan.step import Lengths, micro_batches, samples
from opsd.plan.trace import (
    Peaks,
    fake_model,
    over_layers,
    sampling_peaks,
    step_peaks,
)
from opsd.rollout import SAMPLERS
from opsd_kernels.resolve import load, resolve
from opsd_kernels.sweep import Head, Want, plan_call

RUNTIME = 750_000_000
"""Python, torch, transformers and what else a run imports, on a CPU: measured (docs/plan.md)."""

GPU_RUNTIME = 700_000_000
"""A CUDA context with cuBLAS: assumed, not measured."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `peak`: what is always there and the larger of what a step and what
    sampling add."""

    always: dict[str, int]
    step: dict[str, int]
    sampling: dict[str, int]

    @property
    def peak(self) -> int:
        adds = (sum(self.step.values()), max(self.sampling.values(), default=0))
        return sum(self.always.values()) + max(adds)


class Planner:
    """The memory of runs that train one model with sequences of given lengths.

    device_memory: of the GPU that they are for; None: a CPU.
    """

    def __init__(self, student: PreTrainedConfig, lengths: Lengths, device_memory: int | None):
        self.student, self.lengths, self.device_memory = student, lengths, device_memory
        self._traces: dict[str, Peaks] = {}

    @cached_property
    def parameters(self) -> int:
        """Of the student."""
        return count_parameters(self.student)

    def memory(self, config: Config) -> Memory:
        """The memory of a run by `config`."""
        dtype = _dtype(config)
        always = {"Python, torch": RUNTIME}
        if self.device_memory is not None:
            always = {"CUDA": GPU_RUNTIME}
        always |= {"weights": 4 * self.parameters, "optimizer": 8 * self.parameters}
        decodes = config.method != "sft" or config.eval.problems > 0
        if decodes and config.rollout.engine in SAMPLERS and dtype != torch.float32:
            always["weights that decode"] = dtype.itemsize * self.parameters
        if teacher := self._teacher(config, dtype):
            always["teacher"] = teacher
        return Memory(always, self._step(config, dtype), self._sampling(config, dtype))

    def micro_batch(self, config: Config) -> list[Sample]:
        """The largest micro-batch of a step."""
        share = config.train.share_prefixes
        batches = micro_batches(config, samples(config, self.lengths), share)
        return max(batches, key=_tokens)

    def _teacher(self, config: Config, dtype: torch.dtype) -> int:
        """Of its weights; without a method that asks it, it shades the report's completions."""
        scores = scores_by_teacher(config)
        if not scores and not (config.eval.problems and config.eval.samples):
            return 0
        policy = config.teacher.policy
        if policy == "model":
            section = config.model.model_copy(
                update={"path": config.teacher.path, "gguf_file": config.teacher.gguf_file}
            )
            return dtype.itemsize * count_parameters(architecture(section, "teacher"))
        return {"initial": dtype.itemsize, "ema": 4, "live": 0}[policy] * self.parameters

    def _step(self, config: Config, dtype: torch.dtype) -> dict[str, int]:
        batch, autocast = self.micro_batch(config), dtype == torch.bfloat16
        kernel = self._kernel(config, sum(sample.tokens for sample in batch), dtype)

        def make_step(short: PreTrainedConfig):
            model = fake_model(short, torch.float32)
            if config.train.gradient_checkpointing:
                model.gradient_checkpointing_enable(
                    {"use_reentrant": False, "preserve_rng_state": False}
                )
            objective = _objective(config, short, dtype)
            share = config.train.share_prefixes
            return model, lambda: objective.loss(model, batch, Totals(), share=share)

        def trace() -> Peaks:
            flash = autocast and self.device_memory is not None
            return over_layers(
                self.student,
                lambda short: step_peaks(short, make_step, autocast=autocast, flash=flash),
            )

        whole = self._once(_step_key(config), trace).with_scratch(kernel)
        parts = {"gradients": 4 * self.parameters}
        if autocast:
            parts["weights in bf16, for the products"] = dtype.itemsize * self.parameters
            whole -= dtype.itemsize * self.parameters
        return parts | {"logits (kernel)": kernel, "activations": max(whole - kernel, 0)}

    def _kernel(self, config: Config, tokens: int, dtype: torch.dtype) -> int:
        """The fused loss's scratch memory, by its own plan: tiles of logits, and dW where it is
        summed over blocks in fp32."""
        text, gpu = self.student.get_text_config(), self.device_memory is not None
        vocabulary, width = text.vocab_size, text.hidden_size
        device = torch.device("meta" if gpu else "cpu")
        roles = 2 if config.method in ("opsd", "distill") else 1
        hidden = torch.empty(1, dtype=dtype, device=device).expand(tokens, width)
        weight = torch.empty(1, dtype=dtype, device=device).expand(vocabulary, width)
        other = weight if config.teacher.policy == "live" else weight.view_as(weight)
        plan = plan_call(
            (hidden,) * roles,
            (Head(weight, None), Head(other, None))[:roles],
            Want(hidden=True, weight=True, bias=False),
            load("cuda" if gpu else resolve(config.loss.backend, device, dtype)),
            parts=False,
            vocabulary=vocabulary,
            budget=config.loss.memory_budget,
        )
        summed = plan.blocks > 1 and dtype != torch.float32
        return plan.bytes + (4 * vocabulary * width if summed else 0)

    def _sampling(self, config: Config, dtype: torch.dtype) -> dict[str, int]:
        rollout, held = config.rollout, config.eval
        if rollout.engine == "vllm_server":
            return {}
        if rollout.engine == "vllm":
            assert self.device_memory is not None
            return {"vLLM": int(rollout.gpu_memory * self.device_memory)}
        found = {}
        if config.method != "sft" and rollout.source == "student":
            asked = config.train.problems_per_step * rollout.per_problem
            size = min(rollout.batch_size, asked)
            found["rollouts"] = self._generation(size, dtype, self.lengths.rollout)
        if held.problems:
            longest = held.max_new_tokens or self.lengths.rollout
            size = min(held.batch_size, held.problems)
            found["evaluation"] = self._generation(size, dtype, longest)
        return found

    def _generation(self, size: int, dtype: torch.dtype, longest: int) -> int:
        """Of `size` sequences at once; greedy ones need no more than drawn ones."""
        prompt = self.lengths.prompt

        def trace() -> Peaks:
            return over_layers(
                self.student, lambda short: sampling_peaks(short, dtype, prompt, longest)
            )

        return size * self._once(f"{dtype} {longest}", trace).most

    def _once(self, key: str, trace) -> Peaks:
        if key not in self._traces:
            self._traces[key] = trace()
        return self._traces[key]


def count_parameters(model: PreTrainedConfig) -> int:
    """Parameters of the model, tied ones once; nothing is allocated."""
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(model)
    return sum(parameter.numel() for parameter in whole.parameters())


def _dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def _tokens(batch: list[Sample]) -> int:
    return sum(len(sample.roles[0]) for sample in batch)


def _objective(config: Config, short: PreTrainedConfig, dtype: torch.dtype):
    if config.method == "sft":
        return SFT(config.loss, None)
    teacher = None
    if scores_by_teacher(config):
        teacher = fake_model(short, dtype).requires_grad_(False).eval()
    return {"opsd": OPSD, "distill": Distill, "grpo": GRPO}[config.method](config.loss, teacher)


def _step_key(config: Config) -> str:
    """What decides a step's memory, but for the kernel's budget."""
    values = config.model_dump()
    loss = {name: value for name, value in values["loss"].items() if name != "memory_budget"}
    parts = [values["method"], loss, values["model"], values["teacher"], values["train"]]
    rollout = values["rollout"]
    return json.dumps([parts, rollout["per_problem"], rollout["source"]])
