"""The sections of a config file: their fields, defaults and own checks, as pydantic models.

A field's description is what `opsd train --help` prints. What two fields may be at once is checked
in `compatibility.py`. Needs no torch, so that a bad file is refused within a second.
"""

import datetime
from typing import Any, Literal

from pydantic import Field, field_validator

from opsd.common.urls import check_address
from opsd.config.base import Section
from opsd.config.names import Engine

STUDENT_TEMPLATE = (
    "{{ problem }}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
)
TEACHER_TEMPLATE = (
    "{{ problem }}\n\nHere is a reference solution:\n{{ solution }}\n\nUnderstand it, then "
    "solve the problem in your own words. Please reason step by step, and put your final "
    "answer within \\boxed{}."
)

ALL_LINEAR = "all-linear"


SEEDS = 2**32
"""numpy, which Trainer seeds, takes no larger ones."""


OURS = frozenset(
    "tokenize add_generation_prompt continue_final_message conversation messages return_dict "
    "return_tensors return_assistant_tokens_mask tokenizer_kwargs padding truncation "
    "max_length".split()
)
"""Chat-template arguments that decide what a context is, and are not the template's own."""


class LoraSection(Section):
    """Low-rank adapters, trained in the place of the weights. Off unless the section is there."""

    rank: int = Field(64, ge=1, le=1 << 16, description="Rank of the adapters.")
    alpha: float = Field(128, gt=0, description="The adapters' output counts alpha ÷ rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapters.")
    targets: list[str] = Field(
        [ALL_LINEAR],
        min_length=1,
        description="Names of the layers to adapt, such as [q_proj, v_proj]; all-linear is every "
        "linear layer but the head.",
    )
    quantize: Literal["none", "nf4"] = Field(
        "none", description="nf4: hold the frozen weights in 4 bits (QLoRA); needs a GPU."
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _one_target(cls, targets: Any) -> Any:
        return [targets] if isinstance(targets, str) else targets

    @field_validator("targets")
    @classmethod
    def _check_targets(cls, targets: list[str]) -> list[str]:
        if ALL_LINEAR in targets and len(targets) > 1:
            raise ValueError(f"it must be {ALL_LINEAR} alone, or names of layers")
        return targets


class ModelSection(Section):
    """The model that learns."""

    path: str = Field(
        description="A transformers directory, a hub name, or the directory of a GGUF file."
    )
    gguf_file: str | None = Field(None, description="The GGUF file's name inside `path`.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="Attention implementation of transformers."
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that a hub repository ships. Only for those you trust."
    )
    lora: LoraSection | None = Field(
        None, description="Train low-rank adapters, the weights frozen (docs/scale.md)."
    )


class SourceSection(Section):
    """One source of several; what it does not say, data says."""

    source: str = Field(description="As data.source.")
    weight: float = Field(
        1.0, gt=0, le=1000, description="How often each of its rows stands in the training data."
    )
    columns: dict[str, str] = Field({}, description="As data.columns.")
    split: str | None = Field(None, description="As data.split.")
    limit: int | None = Field(None, ge=1, description="As data.limit.")
    options: dict[str, Any] = Field({}, description="As data.options.")


class DataSection(Section):
    """What it learns from: rows with a problem, a solution and an answer."""

    source: str | list[str | SourceSection] = Field(
        description="A file (JSON lines, JSON, CSV, TSV, parquet; also gzipped), a directory saved "
        "by `datasets`, a hub name, or reasoning_gym:<task>. Or a list of these, each a name or a "
        "mapping with source, weight, columns, split, limit and options."
    )
    incomplete: Literal["error", "skip"] = Field(
        "error",
        description="A row without the text of a column that the run needs: stop, or leave it out "
        "and count it.",
    )
    columns: dict[str, str] = Field(
        {}, description="Our column → theirs, for problem, solution, answer; dots reach inside."
    )
    split: str | None = Field(
        None, description="Split of a dataset that has several; none: train. Files have none."
    )
    limit: int | None = Field(None, ge=1, description="Use at most this many rows.")
    size: int | None = Field(
        None, ge=1, le=10_000_000, description="reasoning_gym: how many problems to draw."
    )
    options: dict[str, Any] = Field({}, description="reasoning_gym: the task's own options.")


class PromptsSection(Section):
    """What each role is shown. Jinja templates, in a sandbox, over a row's columns."""

    student: str = Field(
        STUDENT_TEMPLATE,
        description="The student's user message; a Jinja template over the row's columns.",
    )
    teacher: str = Field(
        TEACHER_TEMPLATE,
        description="The teacher's user message. Problem first, solution after it. May use "
        "`rollout` and `peers` too (docs/methods.md); where it comes out empty, nothing is learnt.",
    )
    system: str | None = Field(None, description="A system message for both roles.")
    student_system: str | None = Field(
        None, description="The student's own system message, instead of prompts.system."
    )
    teacher_system: str | None = Field(
        None, description="The teacher's own system message, instead of prompts.system."
    )
    target: str = Field(
        "{{ solution }}", description="method sft: the text to learn, over the row's columns."
    )
    student_chat: dict[str, Any] = Field(
        {}, description="The student's chat-template arguments, such as enable_thinking: false."
    )
    teacher_chat: dict[str, Any] = Field({}, description="The teacher's chat-template arguments.")
    student_prefill: str = Field(
        "", description="Text that the student's answer starts with, such as an opening tag."
    )
    teacher_prefill: str = Field("", description="The same for the teacher's context.")
    date: str | None = Field(
        None,
        description="The date (2026-11-28) that a chat template writes where it asks for today's; "
        "none: the day on which the run began, which it keeps.",
    )
    too_long: Literal["error", "skip"] = Field(
        "error",
        description="A row whose context and rollout do not fit the model's window: stop, or "
        "leave it out and count it.",
    )

    @field_validator("date")
    @classmethod
    def _check_date(cls, date: str | None) -> str | None:
        if date is not None:
            try:
                datetime.date.fromisoformat(date)
            except ValueError:
                raise ValueError("it must be a date such as 2026-11-28") from None
        return date

    @field_validator("date", mode="before")
    @classmethod
    def _date_as_text(cls, date: Any) -> Any:
        return date.isoformat() if isinstance(date, datetime.date) else date

    @field_validator("student_chat", "teacher_chat")
    @classmethod
    def _check_chat(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in OURS & arguments.keys():
            raise ValueError(f"{name!r} is set by opsd, and is no argument of a chat template's")
        return arguments


class TeacherSection(Section):
    """Who scores the student's tokens."""

    policy: Literal["initial", "live", "ema", "model"] = Field(
        "initial",
        description="Whose weights score the rollouts: the student's at step 0, its current ones, "
        "their moving average, or another model's.",
    )
    ema_decay: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="policy ema: what an update keeps of the average; 0: a copy of the student.",
    )
    update_every: int = Field(
        1, ge=1, description="policy ema: steps between two updates of the average."
    )
    path: str | None = Field(
        None, description="policy model: a model directory or hub name, of the same vocabulary."
    )
    revision: str | None = Field(None, description="policy model: its revision on the hub.")
    gguf_file: str | None = Field(None, description="policy model: a GGUF file in path.")
    quantize: Literal["none", "int8"] = Field(
        "none",
        description="policies initial and model: hold the linear layers' weights in 8 bits.",
    )
    offload: bool = Field(
        False,
        description="policies initial and model: keep the layers in the CPU's memory, and bring "
        "each to the GPU when it runs.",
    )


class RolloutSection(Section):
    """How the student's solutions are sampled."""

    engine: Engine = Field(
        "generate",
        description="transformers' generate in length-sorted batches, its continuous batching, "
        "vLLM on the GPU that trains, or a vLLM server (docs/vllm.md).",
    )
    source: Literal["student", "teacher", "reference"] = Field(
        "student",
        description="opsd, distill: who wrote what is learnt from; student is on-policy, reference "
        "is prompts.target.",
    )
    group_size: int = Field(1, ge=1, description="Rollouts a problem (G).")
    max_new_tokens: int = Field(1024, ge=1, description="Longest rollout, in tokens.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling; 1 is off.")
    top_k: int = Field(0, ge=0, description="Sample among the k likeliest; 0 is off.")
    batch_size: int = Field(64, ge=1, description="Sequences decoded at once.")
    dynamic_sampling: int = Field(
        0,
        ge=0,
        description="grpo: rounds of other problems that may be drawn in a step for those whose "
        "rewards are all alike (DAPO's dynamic sampling).",
    )

    gpu_memory: float = Field(
        0.4, gt=0, lt=1, description="vllm: share of the GPU's memory that it holds while sampling."
    )
    server: str | None = Field(
        None, description="vllm_server: its address, such as http://localhost:8000."
    )
    server_timeout: float = Field(
        1800, gt=0, description="vllm_server: seconds until an unanswered request is sent again."
    )
    server_patience: float = Field(
        300,
        gt=0,
        description="vllm_server: seconds without success until the run stops, with a checkpoint.",
    )
    weights_dir: str | None = Field(
        None,
        description="vllm_server: where the weights are left for it (/dev/shm is fast on one "
        "machine); none: in output.dir. It must see the same path.",
    )

    @field_validator("server")
    @classmethod
    def _check_address(cls, address: str | None) -> str | None:
        if address is not None:
            check_address(address)
        return address


class CollapseSection(Section):
    """When a run counts as collapsed, each measure averaged over `window` steps."""

    on: Literal["warn", "stop", "off"] = Field(
        "warn", description="What to do when the run collapses: say so, end it, or nothing."
    )
    window: int = Field(10, ge=1, description="Steps that are averaged before they are judged.")
    no_signal: int = Field(
        5,
        ge=0,
        description="Steps in a row without anything to learn (equal rewards, a gradient or "
        "divergence of 0, every rollout cut) until the run says so; 0: never.",
    )
    entropy: float = Field(
        0.1, ge=0, lt=1, description="Collapse: the student's entropy ÷ its first window's."
    )
    length: float = Field(
        0.2, ge=0, lt=1, description="Collapse: the rollouts' length ÷ its first window's."
    )
    pass_at_k: float = Field(
        0.5, ge=0, lt=1, description="Collapse: pass@k of the rollouts ÷ its best window's."
    )
    inverted_gradient: float = Field(
        0.5, gt=0, le=1, description="Collapse: more tokens than this with an inverted gradient."
    )


class TrainSection(Section):
    """Steps, optimizer, memory and checkpoints."""

    steps: int = Field(100, ge=1, description="Steps: rollouts, then one optimizer update or more.")
    token_budget: int | None = Field(
        None, ge=1, description="Stop when so many tokens are generated (sft: trained)."
    )
    problems_per_step: int = Field(32, ge=1, description="Problems a step.")
    mini_batches: int = Field(
        1, ge=1, description="Parts of a step's problems, with an optimizer update each."
    )
    inner_epochs: int = Field(
        1, ge=1, description="Times that a step's rollouts are gone through (TRL's num_iterations)."
    )
    learning_rate: float = Field(5e-6, gt=0, description="Highest learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Learning rate after the warm-up."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first beta.")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second beta.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient's norm; 0 is off.")
    micro_batch_tokens: int = Field(
        8192, ge=1, description="Tokens (padding included) that one forward may hold."
    )
    share_prefixes: bool = Field(
        True,
        description="Run each context once for all its rollouts, by our own exact attention "
        "instead of model.attention. --no-share turns it off.",
    )
    prefix_kernel: Literal["auto", "tiles", "flash", "flash_3", "flash_attn", "flex"] = Field(
        "auto",
        description="Kernel of that attention: batched products (any machine), torch's flash "
        "attention, that with FlashAttention 3, the flash-attn package, FlexAttention.",
    )
    precision: Literal["bf16", "fp32"] = Field(
        "bf16",
        description="Weights and optimizer are fp32; bf16: forward, backward and rollouts in bf16.",
    )
    optimizer: str = Field(
        "adamw_torch_fused",
        description="An optimizer of transformers' Trainer, such as adafactor or adamw_bnb_8bit.",
    )
    gradient_checkpointing: Literal[False, True, "reentrant"] = Field(
        False,
        description="Recompute activations in backward: less memory, a third more time. reentrant: "
        "by torch's older form of it.",
    )
    sharding: Literal["none", "fsdp2", "zero1", "zero2", "zero3"] = Field(
        "none",
        description="Of several processes (torchrun, accelerate launch): none keeps all weights in "
        "each (DDP), fsdp2 splits weights, gradients and optimizer among them; DeepSpeed's zero1 "
        "splits the optimizer, zero2 gradients too, zero3 all.",
    )
    not_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="A step whose loss or gradient is not finite: stop, or leave it out and go on; "
        "its batch is kept for `opsd replay`.",
    )
    seed: int = Field(0, ge=0, lt=SEEDS, description="Seed of data order and sampling.")
    save_every: int = Field(
        0, ge=0, description="Checkpoint each so many steps; 0: only at the end."
    )
    save_total_limit: int = Field(2, ge=1, description="Checkpoints kept.")
    collapse: CollapseSection = Field(
        CollapseSection(), description="When a run counts as collapsed."
    )


class EvalSection(Section):
    """Held-out accuracy, measured before, after and during training."""

    source: str | None = Field(
        None, description="Held-out problems, as data.source; none: taken from data.source."
    )
    columns: dict[str, str] | None = Field(None, description="As data.columns, for eval.source.")
    split: str | None = Field(
        None, description="As data.split, for eval.source; none: test, where it has splits."
    )
    options: dict[str, Any] | None = Field(None, description="As data.options, for eval.source.")
    problems: int = Field(200, ge=0, description="Held-out problems; 0: no evaluation.")
    every: int = Field(
        0, ge=0, description="Evaluate each so many steps; 0: only before and after."
    )
    teacher: bool = Field(
        False, description="Evaluate the teacher's prompt too, once, before training."
    )
    max_new_tokens: int | None = Field(
        None, ge=1, description="Longest answer; none: the rollout's."
    )
    batch_size: int = Field(64, ge=1, description="Sequences decoded at once.")
    samples: int = Field(
        3, ge=0, description="Held-out problems whose completions are kept for the report."
    )


class OutputSection(Section):
    """Where the results go."""

    dir: str = Field("runs/opsd", description="The run's directory.")
    rollouts: int = Field(
        4,
        ge=0,
        description="Rollouts of each step that rollouts.jsonl keeps, with their text, their "
        "reward and how they were drawn.",
    )
    report_to: list[Literal["wandb", "tensorboard"]] = Field(
        [], description="Also log there, through transformers' Trainer."
    )
    merge: bool = Field(
        False,
        description="model.lora: make model/ the whole model, adapters added in; they are in "
        "adapter/.",
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Of the weights in model/. auto: of a whole model, what the base model's files "
        "have; of adapters, fp32. Checkpoints are always as it trains.",
    )
    push_to_hub: str | None = Field(
        None, description="Upload model/ to this hub repository (owner/name) at the end."
    )
    hub_private: bool = Field(True, description="Make that repository private, if it is new.")
