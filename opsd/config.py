"""The configuration of a run: what a YAML file may say, its defaults, and its checks.

Each section is a pydantic model; a field's description is what `opsd train --help` prints. Unknown
keys are errors that suggest the nearest name. Nothing here imports torch, so that a bad file is
refused within a second.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from opsd import combinations
from opsd.address import check_address
from opsd.errors import UserError

STUDENT_TEMPLATE = (
    "{{ problem }}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
)
TEACHER_TEMPLATE = (
    "{{ problem }}\n\nHere is a reference solution:\n{{ solution }}\n\nUnderstand it, then "
    "solve the problem in your own words. Please reason step by step, and put your final "
    "answer within \\boxed{}."
)

ALL_LINEAR = "all-linear"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class LoraSection(Section):
    rank: int = Field(64, ge=1, description="Rank of the adapters.")
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


class DataSection(Section):
    source: str = Field(
        description="A .jsonl, .json or .parquet file, a directory saved by `datasets`, a hub "
        "name, or reasoning_gym:<task>."
    )
    columns: dict[str, str] = Field(
        {}, description="Our column → theirs, for problem, solution, answer; dots reach inside."
    )
    split: str = Field("train", description="Split of a dataset that has several.")
    limit: int | None = Field(None, ge=1, description="Use at most this many rows.")
    size: int | None = Field(None, ge=1, description="reasoning_gym: how many problems to draw.")
    options: dict[str, Any] = Field({}, description="reasoning_gym: the task's own options.")


class PromptsSection(Section):
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
    too_long: Literal["error", "skip"] = Field(
        "error",
        description="A row whose context and rollout do not fit the model's window: stop, or "
        "leave it out and count it.",
    )


class TeacherSection(Section):
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
    engine: Literal["generate", "continuous", "vllm", "vllm_server"] = Field(
        "generate",
        description="transformers' generate in length-sorted batches, its continuous batching, "
        "vLLM on the GPU that trains, or a vLLM server (docs/vllm.md).",
    )
    source: Literal["student", "teacher", "reference"] = Field(
        "student",
        description="opsd, distill: who wrote what is learnt from; student is on-policy, reference "
        "is prompts.target.",
    )
    per_problem: int = Field(1, ge=1, description="Rollouts a problem (G).")
    max_new_tokens: int = Field(1024, ge=1, description="Longest rollout, in tokens.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling; 1 is off.")
    top_k: int = Field(0, ge=0, description="Sample among the k likeliest; 0 is off.")
    batch_size: int = Field(64, ge=1, description="Sequences decoded at once.")
    resample: int = Field(
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


class WeightsSection(Section):
    correct: float = Field(1.0, ge=0, description="Weight of rollouts that are right.")
    incorrect: float = Field(1.0, ge=0, description="Weight of rollouts that are wrong.")
    truncated: float = Field(
        1.0, ge=0, description="Weight of rollouts cut at rollout.max_new_tokens."
    )
    skip_first: int = Field(0, ge=0, description="Tokens at a rollout's start that count nothing.")
    position: list[float] = Field(
        [1.0, 1.0],
        min_length=2,
        max_length=2,
        description="Weights of a rollout's first and last token, linear between them.",
    )
    maths: float = Field(1.0, ge=0, description="Weight of tokens with digits or symbols.")
    style: float = Field(
        1.0, ge=0, description="Weight of words about thinking itself, such as wait, so, maybe."
    )
    special: float = Field(1.0, ge=0, description="Weight of the tokenizer's special tokens.")
    other: float = Field(1.0, ge=0, description="Weight of all other tokens.")

    @field_validator("position")
    @classmethod
    def _check_position(cls, ends: list[float]) -> list[float]:
        if min(ends) < 0 or max(ends) == 0:
            raise ValueError("weights must be at least 0, and one of them more")
        return ends


class RewardSection(Section):
    verifier: str = Field(
        "math",
        description="What grades a rollout: math (its last \\boxed{}, by math-verify), or "
        "FILE.py:FUNCTION, called with the text and the row (docs/methods.md).",
    )
    correct_at: float = Field(
        1.0, description="The verifier's score from which a rollout is right."
    )
    format: str | None = Field(
        None, description="A regular expression that the whole rollout should match."
    )
    format_weight: float = Field(0.1, gt=0, description="Reward of a match.")
    overlong_buffer: int | None = Field(
        None,
        ge=1,
        description="Last tokens before rollout.max_new_tokens over which the reward falls by 1 "
        "(DAPO's soft overlong punishment).",
    )
    log: bool = Field(
        False, description="Grade rollouts for the log's sake (pass@k) where no loss needs it."
    )

    @field_validator("format")
    @classmethod
    def _check_format(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"it is no regular expression: {error}") from None
        return pattern


class LossSection(Section):
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "sampled_token"] = Field(
        "forward_kl",
        description="opsd: D(teacher ‖ student) over the vocabulary; sampled_token: policy "
        "gradient with log p_T - log p_S of the rollout's own tokens (docs/methods.md).",
    )
    beta: float = Field(0.5, gt=0, lt=1, description="opsd: the teacher's share in jsd's mixture.")
    temperature: float = Field(1.0, gt=0, description="opsd: divides both roles' logits.")
    clip: Literal["none", "entry", "token"] = Field(
        "none",
        description="opsd: bound each vocabulary entry's part (the official code's; can invert the "
        "gradient), or each token's.",
    )
    clip_threshold: float = Field(0.05, gt=0, description="opsd: the clip's bound τ, in nats.")
    importance_bound: float | None = Field(
        2.0,
        gt=0,
        description="Rollouts by vLLM, or of before a step's first update: a token counts by its "
        "probability under the student ÷ under what sampled it, at most this; null: as it is.",
    )
    weights: WeightsSection = Field(
        WeightsSection(), description="What a token counts; the factors multiply."
    )
    normalise: Literal["token", "rollout", "constant"] = Field(
        "token",
        description="The step's loss is the mean over its tokens, the mean over rollouts of their "
        "tokens' mean (TRL's SDFT, the first GRPO), or the sum ÷ (rollouts * max_new_tokens) "
        "(Dr. GRPO).",
    )
    reward: RewardSection = Field(RewardSection(), description="How rollouts are graded.")
    epsilon: float = Field(
        0.2, gt=0, lt=1, description="grpo, sampled_token: lower clip of the probability ratio."
    )
    epsilon_high: float | None = Field(
        None, gt=0, description="Its upper clip; none: epsilon (DAPO: 0.28)."
    )
    kl: float = Field(
        0.0, ge=0, description="grpo: weight of the KL to the reference, teacher.policy's weights."
    )
    credit: float = Field(
        0.0,
        ge=0,
        le=1,
        description="grpo: how far the teacher shares a rollout's advantage out among its tokens "
        "(RLSD's λ).",
    )
    credit_clip: float = Field(
        0.2, gt=0, lt=1, description="grpo: a token's share is within 1 ± this (RLSD's ε_w)."
    )
    credit_steps: int | None = Field(
        None, ge=1, description="grpo: steps over which credit falls to 0; none: it stays."
    )
    scale_advantages: bool = Field(
        True, description="grpo: divide advantages by the group's standard deviation."
    )
    roles: list[Literal["student", "teacher"]] = Field(
        ["student"],
        min_length=1,
        description="sft: whose contexts the target follows. Both: the cold start.",
    )
    backend: Literal["auto", "torch", "cpp", "triton", "cuda"] = Field(
        "auto", description="The kernel's backend."
    )
    memory_budget: int | None = Field(
        None, ge=1 << 20, description="Bytes of logits the kernel may hold; none: its own choice."
    )


class CollapseSection(Section):
    on: Literal["warn", "stop", "off"] = Field(
        "warn", description="What to do when the run collapses: say so, end it, or nothing."
    )
    window: int = Field(10, ge=1, description="Steps that are averaged before they are judged.")
    entropy: float = Field(
        0.1, ge=0, lt=1, description="Collapse: the student's entropy ÷ its first window's."
    )
    length: float = Field(
        0.2, ge=0, lt=1, description="Collapse: the rollouts' length ÷ its first window's."
    )
    pass_at_k: float = Field(
        0.5, ge=0, lt=1, description="Collapse: pass@k of the rollouts ÷ its best window's."
    )
    opposed: float = Field(
        0.5, gt=0, le=1, description="Collapse: more tokens than this with an inverted gradient."
    )


class TrainSection(Section):
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
    sharding: Literal["none", "fsdp2"] = Field(
        "none",
        description="Of several processes (torchrun, accelerate launch): none keeps all weights in "
        "each (DDP), fsdp2 splits weights, gradients and optimizer among them.",
    )
    not_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="A step whose loss or gradient is not finite: stop, or leave it out and go on; "
        "its batch is kept for `opsd replay`.",
    )
    seed: int = Field(0, ge=0, description="Seed of data order and sampling.")
    save_every: int = Field(
        0, ge=0, description="Checkpoint each so many steps; 0: only at the end."
    )
    save_total_limit: int = Field(2, ge=1, description="Checkpoints kept.")
    collapse: CollapseSection = Field(
        CollapseSection(), description="When a run counts as collapsed."
    )


class EvalSection(Section):
    source: str | None = Field(
        None, description="Held-out problems, as data.source; none: taken from data.source."
    )
    columns: dict[str, str] | None = Field(None, description="As data.columns, for eval.source.")
    split: str = Field("test", description="As data.split, for eval.source.")
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
    dir: str = Field("runs/opsd", description="The run's directory.")
    report_to: list[Literal["wandb", "tensorboard"]] = Field(
        [], description="Also log there, through transformers' Trainer."
    )
    merge: bool = Field(
        False,
        description="model.lora: make model/ the whole model, adapters added in; they are in "
        "adapter/.",
    )
    push_to_hub: str | None = Field(
        None, description="Upload model/ to this hub repository (owner/name) at the end."
    )
    hub_private: bool = Field(True, description="Make that repository private, if it is new.")


class Config(Section):
    """A training run."""

    method: Literal["opsd", "grpo", "sft", "distill"] = Field(
        "opsd",
        description="On-policy self-distillation, GRPO, SFT on the solutions, or distillation from "
        "a separate teacher that sees what the student sees.",
    )
    model: ModelSection
    data: DataSection
    prompts: PromptsSection = PromptsSection()
    teacher: TeacherSection = TeacherSection()
    rollout: RolloutSection = RolloutSection()
    loss: LossSection = LossSection()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    output: OutputSection = OutputSection()

    @model_validator(mode="after")
    def _check_together(self) -> "Config":
        teacher = self.teacher
        if teacher.policy == "model" and teacher.path is None:
            raise ValueError(
                "teacher.path is missing: teacher.policy 'model' needs the model that teaches"
            )
        if teacher.policy != "model" and teacher.path is not None:
            raise ValueError(
                f"teacher.path is {teacher.path!r}: it is for teacher.policy 'model', not "
                f"{teacher.policy!r}"
            )
        if self.method == "distill" and teacher.policy != "model":
            raise ValueError(
                f"teacher.policy is {teacher.policy!r}: distill shows the teacher what the student "
                "sees, so it must be 'model', another model, with teacher.path"
            )
        if self.rollout.source != "student" and self.method not in ("opsd", "distill"):
            raise ValueError(
                f"rollout.source is {self.rollout.source!r}: that is for opsd and distill; "
                f"{self.method} has its own"
            )
        self._check_engine()
        if self.method == "grpo" and self.rollout.per_problem < 2:
            raise ValueError(
                f"rollout.per_problem is {self.rollout.per_problem}: grpo compares a problem's "
                "rollouts with each other and needs at least 2"
            )
        self._check_adapters()
        self._check_teacher_memory()
        combinations.check(self)
        if self.train.warmup_steps > self.train.steps:
            raise ValueError(
                f"train.warmup_steps is {self.train.warmup_steps}: it may be at most train.steps "
                f"({self.train.steps})"
            )
        return self

    def _check_engine(self) -> None:
        rollout = self.rollout
        if rollout.engine == "vllm_server" and rollout.server is None:
            raise ValueError("rollout.server is missing: rollout.engine 'vllm_server' needs it")
        for name in ("server", "weights_dir"):
            value = getattr(rollout, name)
            if value is not None and rollout.engine != "vllm_server":
                raise ValueError(
                    f"rollout.{name} is {value!r}: it is for rollout.engine 'vllm_server', not "
                    f"{rollout.engine!r}"
                )
        if rollout.engine.startswith("vllm") and rollout.source != "student":
            raise ValueError(
                f"rollout.engine is {rollout.engine!r}: vLLM samples from the student; with "
                f"rollout.source {rollout.source!r} it may be 'generate' or 'continuous'"
            )
        if rollout.engine.startswith("vllm") and self.model.gguf_file is not None:
            raise ValueError(
                f"model.gguf_file is {self.model.gguf_file!r}: vLLM is given weights under the "
                "names of a transformers directory; save the model as one first"
            )

    def _check_adapters(self) -> None:
        model, output = self.model, self.output
        if model.lora is None:
            if output.merge:
                raise ValueError(
                    "output.merge is true: without model.lora there is nothing to merge"
                )
            return
        if model.gguf_file is not None:
            raise ValueError(
                f"model.gguf_file is {model.gguf_file!r}: an adapter must find its model again as "
                "a transformers directory or on the hub; save the model as one first"
            )
        if model.lora.quantize != "none" and self.rollout.engine.startswith("vllm"):
            raise ValueError(
                f"rollout.engine is {self.rollout.engine!r}: weights in 4 bits "
                "(model.lora.quantize) cannot be given to it (allowed: generate, continuous)"
            )
        if model.lora.quantize != "none" and self.train.sharding != "none":
            raise ValueError(
                f"train.sharding is {self.train.sharding!r}: weights in 4 bits "
                "(model.lora.quantize) cannot be split; train with none"
            )

    def _check_teacher_memory(self) -> None:
        teacher = self.teacher
        for name, off in (("quantize", "none"), ("offload", False)):
            value = getattr(teacher, name)
            if value == off:
                continue
            if teacher.policy not in ("initial", "model"):
                raise ValueError(
                    f"teacher.{name} is {value!r}: it is for teacher.policy 'initial' or 'model', "
                    f"not {teacher.policy!r}"
                )
            if teacher.policy == "initial" and self.model.lora is not None:
                raise ValueError(
                    f"teacher.{name} is {value!r}: with model.lora the initial teacher is the "
                    "student's own frozen weights, and there is no other copy of them"
                )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.field=value` overrides, and check the result.

    Raises UserError: file missing, not YAML, unknown keys (with the nearest name), wrong types or
    values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"CONFIG is {str(path)!r}: no such file")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{path} holds {type(values).__name__}: it must hold sections such as model: and data:"
        )
    # A section whose lines are all commented out reads as null: the same as no section.
    values = {key: value for key, value in values.items() if value is not None}
    return parse_config(with_overrides(values, overrides))


def with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The sections with `section.field=value` overrides written into them. Raises UserError."""
    for override in overrides:
        _apply(values, override)
    return values


def parse_config(values: dict[str, Any]) -> Config:
    """Check a dictionary of sections and return the Config. Raises UserError."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(explain(problem, Config) for problem in error.errors())) from None


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config (all defaults filled in) as YAML."""
    text = yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True, width=100)
    path.write_text(text)


def describe() -> Iterator[tuple[str, str, str, str]]:
    """Every field as (section, name, default, description), for `--help`."""
    for section, field in Config.model_fields.items():
        if section == "method":
            yield "", "method", "opsd", f"{field.description} (opsd | grpo | sft | distill)"
            continue
        for name, inner in field.annotation.model_fields.items():
            yield section, name, *_field(inner)
            inside = _section(inner.annotation)
            for deeper, field_inside in (inside.model_fields if inside else {}).items():
                yield section, f"{name}.{deeper}", *_field(field_inside)


def _field(field: FieldInfo) -> tuple[str, str]:
    """A field's default and description, as text."""
    default = "required" if field.is_required() else str(field.get_default())
    return default, field.description + _choices(field.annotation)


def _choices(annotation: Any) -> str:
    if getattr(annotation, "__origin__", None) is Literal:
        return f" ({' | '.join(map(str, annotation.__args__))})"
    return ""


def _section(annotation: Any) -> type[Section] | None:
    """The section that a field of this type holds, or may hold; None if it holds values."""
    kinds = getattr(annotation, "__args__", None) or (annotation,)
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, Section)), None)


def _apply(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.split(".")
    if not equals or not all(keys):
        raise UserError(f"override is {override!r}: it must look like train.learning_rate=1e-5")
    for key in keys[:-1]:
        if values.get(key) is None:  # a section that is not there, or null
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise UserError(f"override is {override!r}: {key!r} is not a section")
    try:
        values[keys[-1]] = yaml.safe_load(text)
    except yaml.YAMLError:
        values[keys[-1]] = text


def explain(problem: Any, model: type[Section]) -> str:
    """One pydantic error of `model` as a sentence: the field, the value, what is allowed."""
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _known(location[:-1], model)
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        where = f"in section {'.'.join(location[:-1])!r}" if len(location) > 1 else "at the top"
        return f"unknown key {location[-1]!r} {where}; {hint}"
    if problem["type"] == "missing":
        return f"{name} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if not name:
        return message
    return f"{name} is {problem['input']!r}: {message[0].lower() + message[1:]}"


def _known(location: Sequence[str], model: Any) -> list[str]:
    for part in location:
        model = _section(model.model_fields[part].annotation)
    return list(model.model_fields)
