"""Estimate a run's memory: the part always in use, a step's part, and sampling's part."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from opsd.common.errors import UserError
from opsd.common.precision import compute_dtype
from opsd.common.urls import is_address
from opsd.config.config import Config
from opsd.config.names import DIVERGENCE_METHODS, SERVERS
from opsd.config.requirements import scores_by_teacher
from opsd.config.sections import ALL_LINEAR, LoraSection, ModelSection, TeacherSection
from opsd.distributed.processes import SPLIT_WEIGHTS
from opsd.models.head import decoder_of
from opsd.models.lora import check_targets, is_linear, without_adapter
from opsd.models.teacher import Member, teacher_section
from opsd.objectives import GRPO, OPSD, SFT, Distill, Objective, SampleGroup, Totals, samples_of
from opsd.plan import fake_run
from opsd.plan.architectures import architecture
from opsd.plan.workload import Lengths, micro_batches, sample_groups
from opsd.rollout import SAMPLERS
from opsd.rollout.decoding import packs
from opsd.training.step import OPSDStep
from opsd_kernels.plan import Plan
from opsd_kernels.resolve import load, resolve
from opsd_kernels.sweep import Head, plan_call

RUNTIME = 800_000_000
"""Bytes on a CPU: Python, torch, transformers and other imports (620 MB), and holes in glibc's heap
(180 MB in runs with small tensors; large ones leave none). Measured, see docs/plan.md."""

GPU_RUNTIME = 700_000_000
"""Bytes of a CUDA context with cuBLAS: assumed, not measured."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device: always in use, added by a step, added by sampling (one at a time)."""

    always: dict[str, int]
    step: dict[str, int]
    sampling: dict[str, int]

    @property
    def peak(self) -> int:
        adds = (sum(self.step.values()), max(self.sampling.values(), default=0))
        return sum(self.always.values()) + max(adds)


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters. own: of the student without adapters. linear: of these, in linear
    layers. train: those that train, its own or its adapters'. products: in linear layers and in the
    head, also where it is tied to the embeddings."""

    own: int
    linear: int
    train: int
    products: int


class Planner:
    """Computes the memory of runs that train one model on sequences of given lengths."""

    def __init__(
        self,
        student: PreTrainedConfig,
        lengths: Lengths,
        device_memory: int | None,  # bytes of each GPU; None: a CPU
        processes: int = 1,  # the number of processes that train together, each on a device
    ):
        for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
            if not hasattr(student.get_text_config(), name):
                raise UserError(
                    f"model.path: a plan cannot read {student.model_type}, whose config has no "
                    f"{name}; a short run says what it takes"
                )
        self.student, self.lengths = student, lengths
        self.device_memory, self.processes = device_memory, processes
        self._known: dict[str, Any] = {}  # results that several configs share, by key

    @cached_property
    def parameters(self) -> int:
        """The student's number of parameters, without adapters."""
        return count_parameters(self.student)

    @cached_property
    def unshared_because(self) -> str | None:
        """The reason why the student cannot share prefixes; None if it can."""
        return fake_run.unshared_because(self.student)

    def sizes(self, config: Config) -> Sizes:
        """The student's sizes, computed once for each `model` section."""
        key = config.model.model_dump_json()
        return self._once(key, lambda: _sizes(self.student, config.model))

    def memory(self, config: Config) -> Memory:
        """The memory on each device of a run of `config`."""
        device = "cpu" if self.device_memory is None else "cuda"
        dtype = compute_dtype(config.train.precision, device)
        sizes, lora = self.sizes(config), config.model.lora
        sharding = config.train.sharding
        weights_split = self.processes if sharding in SPLIT_WEIGHTS else 1
        split = self.processes if sharding != "none" else 1
        always = {"Python, torch, heap": RUNTIME}
        if self.device_memory is not None:
            always = {"CUDA": GPU_RUNTIME}
        if lora is None:
            always["weights"] = 4 * sizes.own // weights_split
        else:
            always["weights, frozen"] = _frozen(sizes, dtype, lora.quantize)
            always["adapters"] = 4 * sizes.train
        moments = _moments(config.train.optimizer)
        if sharding.startswith("zero"):
            moments += 4  # DeepSpeed's optimizer keeps its own fp32 copy of the weights
        always["optimizer"] = round(moments * sizes.train) // split
        sampler = config.rollout.engine in SAMPLERS
        decodes = sampler and (config.method != "sft" or config.eval.problems > 0)
        if weights_split > 1 or (decodes and lora is None and dtype != torch.float32):
            always["weights that decode"] = dtype.itemsize * sizes.own
        if teacher := self._teacher(config, dtype):
            always["teacher"] = teacher
        step = self._step(config, dtype, sizes)
        step["gradients"] = step["gradients"] // (1 if sharding == "zero1" else split)
        return Memory(always, step, self._sampling(config, dtype))

    def micro_batch(self, config: Config) -> list[SampleGroup]:
        """The largest micro-batch of a step."""
        share = config.train.share_prefixes
        step = sample_groups(config, self.lengths)
        batches = micro_batches(step, config.train.micro_batch_tokens, share)
        return max(batches, key=_tokens)

    def _teacher(self, config: Config, dtype: torch.dtype) -> int:
        """Bytes of the teacher's weights. Any method loads one if the report shows completions."""
        scores = scores_by_teacher(config)
        if not scores and not (config.eval.problems and config.eval.samples):
            return 0
        distinct: list[TeacherSection] = []
        for member in config.teacher.members():
            distinct += [] if member in distinct else [member]
        return sum(self._teacher_weights(config, member, dtype) for member in distinct)

    def _teacher_weights(self, config: Config, teacher: TeacherSection, dtype: torch.dtype) -> int:
        sizes = self.sizes(config)
        if teacher.policy == "live":
            return 0
        if teacher.policy == "ema":
            return 4 * sizes.train
        if teacher.policy == "initial" and config.model.lora is not None:
            return 0  # the student's own weights, without adapters
        if teacher.policy == "model" and is_address(teacher.path):  # only its head is here
            text = self.student.get_text_config()
            return dtype.itemsize * text.vocab_size * text.hidden_size
        if teacher.policy == "model":
            section = teacher_section(teacher, config.model)
            sizes = _sizes(architecture(section, "teacher"), section)
        linear = dtype.itemsize * sizes.linear
        if teacher.quantize == "int8":
            linear = sizes.linear
        if teacher.offload:
            linear = 0
        return dtype.itemsize * (sizes.own - sizes.linear) + linear

    def _step(self, config: Config, dtype: torch.dtype, sizes: Sizes) -> dict[str, int]:
        batch, autocast = self.micro_batch(config), dtype == torch.bfloat16
        plan, summed = self.loss_plan(config)
        kernel = plan.bytes + summed

        def make_step(short: PreTrainedConfig):
            model = _student(short, config.model, bool(config.train.gradient_checkpointing), dtype)
            objective, teacher = _objective(config, short, dtype)
            step = OPSDStep(model, objective, config.train.share_prefixes)
            return [model, *teacher], lambda: step(batch, Totals())

        def trace() -> fake_run.Peaks:
            how = {"autocast": autocast, "flash": autocast and self.device_memory is not None}
            how["packable"] = self.unshared_because is None
            traced = fake_run.step_peaks
            return fake_run.over_layers(self.student, lambda short: traced(short, make_step, **how))

        total = self._once(_step_key(config), trace).with_scratch(kernel)
        parts = {"gradients": 4 * sizes.train}
        if autocast:
            parts["weights in bf16, for the products"] = dtype.itemsize * sizes.train
            total -= dtype.itemsize * sizes.train
        return parts | {"logits (kernel)": kernel, "activations": max(total - kernel, 0)}

    def loss_plan(self, config: Config) -> tuple[Plan, int]:
        """The kernel's own plan of the largest micro-batch's loss, and the bytes of dW beside it if
        it is summed over groups in fp32."""
        text, gpu = self.student.get_text_config(), self.device_memory is not None
        vocabulary, width = text.vocab_size, text.hidden_size
        dtype = compute_dtype(config.train.precision, "cuda" if gpu else "cpu")
        tokens = sum(sample.tokens for sample in samples_of(self.micro_batch(config)))
        device = torch.device("meta" if gpu else "cpu")
        roles = 2 if config.method in DIVERGENCE_METHODS or config.loss.distil else 1
        trains_head = config.model.lora is None
        hidden = torch.empty(1, dtype=dtype, device=device).expand(tokens, width)
        weight = torch.empty(1, dtype=dtype, device=device).expand(vocabulary, width)
        # A mixture's heads are concatenated along the hidden size.
        mixed = config.teacher.mix and not config.model.lora
        heads = len({m.policy for m in config.teacher.members()}) if mixed else 1
        wide = torch.empty(1, dtype=dtype, device=device).expand(vocabulary, heads * width)
        other = weight if {m.policy for m in config.teacher.members()} == {"live"} else wide
        plan = plan_call(
            (hidden, hidden.new_empty(1).expand(tokens, other.shape[1]))[:roles],
            (Head(weight, None), Head(other, None))[:roles],
            load("cuda" if gpu else resolve(config.loss.backend, device, dtype)),
            two_sums=False,
            vocabulary=vocabulary,
            budget=config.loss.memory_budget,
            trains_head=trains_head,
        )
        summed = trains_head and plan.groups > 1 and dtype != torch.float32
        return plan, 4 * vocabulary * width if summed else 0

    def _sampling(self, config: Config, dtype: torch.dtype) -> dict[str, int]:
        rollout, test = config.rollout, config.eval
        if rollout.engine in SERVERS:
            return {}
        if rollout.engine == "vllm":
            assert self.device_memory is not None
            return {"vLLM": int(rollout.gpu_memory * self.device_memory)}
        found = {}
        if config.method != "sft" and rollout.source == "student":
            size = min(rollout.batch_size, config.train.problems_per_step * rollout.group_size)
            found["rollouts"] = self._generation(config, size, dtype, self.lengths.rollout)
        if test.problems:
            longest = test.max_new_tokens or self.lengths.rollout
            size = min(test.batch_size, test.problems)
            found["evaluation"] = self._generation(config, size, dtype, longest)
        return found

    def _generation(self, config: Config, size: int, dtype: torch.dtype, longest: int) -> int:
        """Bytes to sample `size` sequences at once; greedy sampling takes no more."""
        prompt = self.lengths.prompt

        def trace() -> fake_run.Peaks:
            return fake_run.over_layers(
                self.student, lambda short: fake_run.sampling_peaks(short, dtype, prompt, longest)
            )

        needed = size * self._once(f"{dtype} {longest}", trace).most
        packed = dtype.itemsize * self.sizes(config).products
        on_cpu = self.device_memory is None
        return needed + packed * (on_cpu and packs(packed, dtype, size))

    def _once(self, key: str, find: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = find()
        return self._known[key]


def count_parameters(model: PreTrainedConfig) -> int:
    """Count a model's parameters, tied ones once; allocates nothing."""
    return sum(p.numel() for p in fake_run.meta_model(model, torch.float32).parameters())


def _sizes(model: PreTrainedConfig, section: ModelSection) -> Sizes:
    """The sizes of a model with the adapters of `section`."""
    made = fake_run.meta_model(model, torch.float32)
    own = sum(parameter.numel() for parameter in made.parameters())
    linear, products = (
        sum(layer.weight.numel() for layer in part.modules() if type(layer) is nn.Linear)
        for part in (decoder_of(made), made)
    )
    if section.lora is None:
        return Sizes(own, linear, own, products)
    adapted = _add_adapters(made, section.lora)
    train = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return Sizes(own, linear, train, products)


def _student(
    short: PreTrainedConfig, section: ModelSection, checkpointing: bool, dtype: torch.dtype
) -> PreTrainedModel:
    """The student on the meta device: in fp32, or with fp32 adapters and its weights in `dtype`."""
    model = fake_run.meta_model(short, torch.float32 if section.lora is None else dtype)
    if section.lora is not None:
        model = _add_adapters(model, section.lora)
    if checkpointing:
        # Fake tensors have no random state to preserve.
        options = {"use_reentrant": False, "preserve_rng_state": False}
        model.gradient_checkpointing_enable(options)
    return model


def _add_adapters(model: PreTrainedModel, lora: LoraSection) -> PreTrainedModel:
    """Freeze the model and add LoRA's tensors, as peft does but without peft, in place."""
    check_targets(model, lora)
    head, others = model.get_output_embeddings(), without_adapter(model)
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        named = lora.targets == [ALL_LINEAR] or name.rpartition(".")[2] in lora.targets
        if named and is_linear(layer) and layer is not head and name not in others:
            ends = layer.weight.shape  # [out, in]; [in, out] of a Conv1D
            into, out = ends[::-1] if isinstance(layer, nn.Linear) else ends
            like = {"bias": False, "device": layer.weight.device, "dtype": torch.float32}
            down, up = nn.Linear(into, lora.rank, **like), nn.Linear(lora.rank, out, **like)
            dropout = [nn.Dropout(lora.dropout)] if lora.dropout else []
            layer.adapter = nn.Sequential(*dropout, down, up)
            layer.register_forward_hook(lambda m, x, y: y + m.adapter(x[0].float()) * 2.0)
    return model


def _frozen(sizes: Sizes, dtype: torch.dtype, quantize: str) -> int:
    """Bytes of frozen weights. In NF4 a weight of a linear layer takes half a byte; each 64 of them
    have a scale of 8 bits, and each 256 scales one of 32 bits."""
    if quantize == "nf4":
        return round(sizes.linear * (0.5 + 1 / 64 + 4 / 64 / 256)) + dtype.itemsize * (
            sizes.own - sizes.linear
        )
    return dtype.itemsize * sizes.own


def _moments(optimizer: str) -> float:
    """Bytes of the optimizer's state per trained parameter."""
    if "adafactor" in optimizer or optimizer == "sgd":
        return 0.0  # adafactor keeps only a row and a column of each matrix
    one = "lion" in optimizer or "rmsprop" in optimizer or "adagrad" in optimizer
    each = 1 if "8bit" in optimizer else 4
    return each * (1 if one else 2)


def _tokens(batch: list[SampleGroup]) -> int:
    return sum(len(group.student) + s.tokens for group in batch for s in group.samples)


def _objective(
    config: Config, short: PreTrainedConfig, dtype: torch.dtype
) -> tuple[Objective, list[nn.Module]]:
    """The method's objective, and its teacher's models on the meta device, if any."""
    kind = {"opsd": OPSD, "distill": Distill, "grpo": GRPO, "sft": SFT}[config.method]
    if not scores_by_teacher(config):
        return kind(config.loss.without_code()), []
    # With adapters, all members but those of policy "model" use the student's frozen weights.
    owners = [
        "own" if config.model.lora is not None and own.policy != "model" else own.model_dump_json()
        for own in config.teacher.members()
    ]
    made = {own: fake_run.meta_model(short, dtype).requires_grad_(False).eval() for own in owners}
    sections = config.teacher.mix
    pairs = zip(owners, sections, strict=False)  # without a mixture there are none
    mix = [Member(made[owner], section.context or "", section) for owner, section in pairs]
    return kind(config.loss.without_code(), made[owners[0]], mix=mix), list(made.values())


def _step_key(config: Config) -> str:
    """A key of all fields on which a step's memory depends, except the kernel's budget."""
    values = config.model_dump()
    loss = {name: value for name, value in values["loss"].items() if name != "memory_budget"}
    parts = [values["method"], loss, values["model"], values["teacher"], values["train"]]
    rollout = values["rollout"]
    return json.dumps([parts, rollout["group_size"], rollout["source"]])
