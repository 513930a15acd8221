"""The sections of a config file: their fields, defaults and own checks, as pydantic models.

`opsd train --help` prints the docstrings below the fields. `compatibility.py` checks combinations
of fields. Needs no torch, so that a bad file is refused within a second.
"""

import datetime
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from opsd.common.templates import shipped
from opsd.common.urls import check_address, is_address
from opsd.config.base import Count, Fraction, Natural, NonNegative, Positive, Section, Share
from opsd.config.names import Engine, Policy

STUDENT_TEMPLATE = shipped(
    "{{ problem }}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
)
TEACHER_TEMPLATE = shipped(
    "{{ problem }}\n\nHere is a reference solution:\n{{ solution }}\n\nUnderstand it, then "
    "solve the problem in your own words. Please reason step by step, and put your final "
    "answer within \\boxed{}."
)

ALL_LINEAR = "all-linear"

SEEDS = 2**32
"""Seeds must be below this: numpy, which Trainer seeds, accepts no larger ones."""

OURS = frozenset(
    "tokenize add_generation_prompt continue_final_message conversation messages return_dict "
    "return_tensors return_assistant_tokens_mask tokenizer_kwargs padding truncation "
    "max_length sanitize_control_tokens".split()
)
"""Arguments of apply_chat_template that opsd sets itself: a config may not set them."""


class LoraSection(Section):
    """Low-rank adapters, trained in the place of the weights. Off unless the section is there."""

    rank: int = Field(64, ge=1, le=1 << 16)
    """Rank of the adapters."""
    alpha: Positive = 128
    """The adapters' output is multiplied by alpha ÷ rank."""
    dropout: Share = 0.0
    """Dropout before the adapters."""
    targets: list[str] = Field([ALL_LINEAR], min_length=1)
    """Names of the layers to adapt, such as [q_proj, v_proj]; all-linear is every linear layer but
    the head."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: hold the frozen weights in 4 bits (QLoRA); needs a GPU."""

    @field_validator("targets", mode="before")
    @classmethod
    def _one_target(cls, targets: Any) -> Any:
        return re.split(r",\s*", targets) if isinstance(targets, str) else targets

    @field_validator("targets")
    @classmethod
    def _check_targets(cls, targets: list[str]) -> list[str]:
        if ALL_LINEAR in targets and len(targets) > 1:
            raise ValueError(f"it must be {ALL_LINEAR} alone, or names of layers")
        return targets


class ModelSection(Section):
    """The model that learns."""

    path: str
    """A transformers directory, a hub name, or the directory of a GGUF file."""
    gguf_file: str | None = None
    """The GGUF file's name inside `path`."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation of transformers; `auto`: sdpa, or eager for models without it."""
    trust_remote_code: bool = False
    """Run Python code that a hub repository ships. Only for those you trust."""
    freeze_router: bool = False
    """Mixtures of experts: the routers' weights, which choose experts, do not train."""
    lora: LoraSection | None = None
    """Train low-rank adapters, the weights frozen (docs/scale.md)."""


class PromptsSection(Section):
    """The prompts of both roles: Jinja templates, in a sandbox, over a row's columns."""

    student: str = STUDENT_TEMPLATE
    """The student's user message; a Jinja template over the row's columns."""
    teacher: str = TEACHER_TEMPLATE
    """The teacher's user message. Problem first, solution after it. May use `rollout` and `peers`
    too (docs/methods.md); where it comes out empty, nothing is learnt."""
    contexts: dict[str, str] = Field({})
    """Other messages for teacher.mix: name → template, as prompts.teacher; the chat template's
    arguments, system message and prefill are the teacher's."""
    majority: float | None = Field(None, ge=0, le=1)
    """Teach a row without a solution by the answer on which this share of its rollouts agree, and
    more than on any other (U-OPSD); none: each row needs what the templates use."""
    hold: bool = False
    """Where a row has no solution for the teacher, nor a majority, the teacher sees what the
    student sees: this holds the student at the teacher's weights (docs/methods.md)."""
    system: str | None = None
    """A system message for both roles."""
    student_system: str | None = None
    """The student's own system message, instead of prompts.system."""
    teacher_system: str | None = None
    """The teacher's own system message, instead of prompts.system."""
    target: str = shipped("{{ solution }}")
    """method sft: the text to learn, over the row's columns."""
    student_chat: dict[str, Any] = Field({})
    """The student's chat-template arguments, such as enable_thinking: false."""
    teacher_chat: dict[str, Any] = Field({})
    """The teacher's chat-template arguments."""
    student_prefill: str = ""
    """Text that the student's answer starts with, such as an opening tag."""
    teacher_prefill: str = ""
    """The same for the teacher's context."""
    date: str | None = None
    """The date (2026-11-28) that a chat template writes where it asks for today's; none: the day on
    which the run began, which it keeps."""
    too_long: Literal["error", "skip"] = "error"
    """A row whose context and rollout do not fit the model's window: stop, or leave it out and
    count it."""

    @field_validator("date", mode="before")
    @classmethod
    def _check_date(cls, date: Any) -> Any:
        date = date.isoformat() if isinstance(date, datetime.date) else date
        try:
            return date if date is None else datetime.date.fromisoformat(date).isoformat()
        except (TypeError, ValueError):
            raise ValueError("it must be a date such as 2026-11-28") from None

    @field_validator("student", "teacher", "target")
    @classmethod
    def _check_template(cls, text: str) -> str:
        if re.fullmatch(r"\S+\.(txt|md|jinja2?|j2)", text):
            raise ValueError("it is the template itself, not a file's name: write its text here")
        return text

    @field_validator("contexts")
    @classmethod
    def _check_contexts(cls, contexts: dict[str, str]) -> dict[str, str]:
        for name in contexts:
            if not name.isidentifier() or name in ("student", "teacher", "target"):
                raise ValueError(f"{name!r} must be a plain name, not student, teacher or target")
        return contexts

    @field_validator("student_chat", "teacher_chat")
    @classmethod
    def _check_chat(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in OURS & arguments.keys():
            raise ValueError(f"{name!r} is set by opsd, and cannot be given to a chat template")
        for name, value in arguments.items():
            if str(value).lower() in ("yes", "no", "on", "off"):  # strings, which count as true
                raise ValueError(f"{name} is {value!r}: write true or false")
        return arguments


def _address_or_path(path: str | None) -> str | None:
    if is_address(path):
        check_address(path, "OPSD_TEACHER_KEY")
    return path


class RouteSection(Section):
    """One of several teachers. Without policy and path it has the weights of `teacher`."""

    policy: Policy | None = None
    """Its weights, as teacher.policy; none: with a path model."""
    path: str | None = None
    """policy model: as teacher.path."""

    _check_path = field_validator("path")(_address_or_path)


class MemberSection(RouteSection):
    """A member of teacher.mix. Without policy and path it has the weights of `teacher`."""

    coefficient: float | list[float] | str = 1.0
    """The exponent of its distribution: a number, [first, last] (linear over `steps`), or the name
    of a data column that holds each row's. It may be negative, or above 1."""
    steps: Count | None = None
    """Steps until a coefficient [first, last] is at its last."""
    damping: Positive | None = None
    """A token's exponent is then e = coefficient · (2 / (1 + exp(-damping · JSD)) - 1), where JSD
    is the student's distance from the other members. Their exponents are multiplied by 1 - e."""
    context: str | None = None
    """The context that it sees: teacher, student, or a name in prompts.contexts; none: teacher,
    under distill student."""

    @field_validator("coefficient")
    @classmethod
    def _check_coefficient(cls, value: float | list[float] | str) -> float | list[float] | str:
        if isinstance(value, list) and len(value) != 2:
            raise ValueError("it must be a number, or the first and the last of a schedule")
        return value

    def coefficient_at(self, step: float, columns: Mapping[str, Any] | None = None) -> float:
        """The coefficient after `step` steps, for a row with these columns."""
        value = self.coefficient
        if isinstance(value, str):
            return float((columns or {})[value])
        first, last = value if isinstance(value, list) else (value, value)
        return first + (last - first) * min(1.0, step / (self.steps or 1))


class TeacherSection(Section):
    """Who scores the student's tokens."""

    policy: Policy = "initial"
    """Whose weights score the rollouts: the student's at step 0, its current ones, their moving
    average, or another model's."""
    ema_decay: Share = 0.999
    """policy ema: the share of the average that an update keeps; 0: a copy of the student."""
    update_every: Count = 1
    """policy ema: steps between two updates of the average."""
    path: str | None = None
    """policy model: a model directory or hub name, of the same vocabulary, or the address
    (http://…) of `opsd serve-teacher`."""
    server_patience: Positive = 300
    """policy model, at an address: seconds without a usable answer until the run stops, with a
    checkpoint."""
    revision: str | None = None
    """policy model: its revision on the hub."""
    gguf_file: str | None = None
    """policy model: a GGUF file in path."""
    quantize: Literal["none", "int8"] = "none"
    """policies initial and model: hold the linear layers' weights in 8 bits."""
    offload: bool = False
    """policies initial and model: keep the layers in the CPU's memory, and bring each to the GPU
    when it runs."""
    mix: list[MemberSection] = Field([])
    """Several teachers as one, the product of their distributions, each to the power of its
    coefficient, normalised (docs/methods.md). Evaluations and samples show the first, and the
    reference of loss.kl is its weights."""
    routes: dict[str, RouteSection] = Field({})
    """opsd, distill: several teachers, name → weights, each for the rows that name it. Evaluations
    and samples show the first."""
    column: str = "teacher"
    """routes: the column of the data with the name of each row's teacher."""

    _check_path = field_validator("path")(_address_or_path)

    def members(self) -> list["TeacherSection"]:
        """A section with the weights of each member of the mixture, or of each of several teachers;
        without either [self]."""
        nothing = {"path": None, "revision": None, "gguf_file": None}
        made = []
        for member in self.mix or self.routes.values():
            policy = member.policy or ("model" if member.path else self.policy)
            its = {"path": member.path} if member.path else {}
            other = nothing | its if policy != "model" or its else {}
            made.append(
                self.model_copy(update={"policy": policy, "mix": [], "routes": {}, **other})
            )
        return made or [self]


class RolloutSection(Section):
    """How the student's solutions are sampled."""

    engine: Engine = "generate"
    """transformers' generate in length-sorted batches, its continuous batching (slower on a CPU),
    vLLM on the GPU that trains, or a server of vLLM or SGLang (docs/vllm.md)."""
    source: Literal["student", "teacher", "reference"] = "student"
    """opsd, distill: who writes the text that is learnt from. student is on-policy; reference is
    prompts.target."""
    group_size: Count = 1
    """Rollouts for each problem (G). opsd, distill: as many other problems teach far more."""
    max_new_tokens: Count = 1024
    """Longest rollout, in tokens."""
    temperature: Positive = 1.0
    """Sampling temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling; 1 is off."""
    top_k: Natural = 0
    """Sample among the k likeliest; 0 is off."""
    batch_size: Count = 64
    """Sequences decoded at once."""
    ahead: Literal[0, 1] = 0
    """servers: steps that it samples ahead while a step trains; at 1 a step learns from rollouts by
    the weights of the step before (docs/vllm.md)."""
    dynamic_sampling: Natural = 0
    """grpo: problems whose rewards are all alike are replaced by others, in at most this many
    rounds a step (DAPO's dynamic sampling)."""

    gpu_memory: Fraction = 0.4
    """vllm: share of the GPU's memory that it holds while sampling."""
    server: str | None = None
    """servers: its address, such as http://localhost:8000."""
    server_timeout: Positive = 1800
    """servers: seconds until an unanswered request is sent again."""
    server_patience: Positive = 900
    """servers: seconds without a usable answer until the run stops, with a checkpoint."""
    weights_dir: str | None = None
    """servers: directory through which it gets the weights, under a path that it sees too; none: no
    files where it reads them over TCP (docs/vllm.md), in /dev/shm where it is a process of this
    machine, else in output.dir."""

    @field_validator("server")
    @classmethod
    def _check_address(cls, address: str | None) -> str | None:
        if address is not None:
            check_address(address)
        return address


class CollapseSection(Section):
    """When a run counts as collapsed."""

    on: Literal["warn", "stop", "off"] = "warn"
    """What to do when the run collapses: say so, end it, or nothing."""
    window: Count = 10
    """Steps over which a measure is averaged."""
    no_signal: Natural = 5
    """Steps in a row without anything to learn (equal rewards, a gradient or divergence of 0, every
    rollout cut, weights that stay as they are) until the run says so; 0: never."""
    entropy: Share = 0.1
    """Collapsed if the student's entropy is below this share of its first window's."""
    length: Share = 0.2
    """Collapsed if the rollouts' length is below this share of its first window's."""
    pass_at_k: Share = 0.5
    """Collapsed if the rollouts' pass@k is below this share of its best window's."""
    inverted_gradient: float = Field(0.5, gt=0, le=1)
    """Collapsed if more than this share of tokens has an inverted gradient."""


class TrainSection(Section):
    """Steps, optimizer, memory and checkpoints."""

    steps: Count = 100
    """Steps: rollouts, then one optimizer update or more."""
    token_budget: Count | None = None
    """Stop once this many tokens are generated (sft: trained)."""
    early_stop: Count | None = None
    """Stop after this many held-out evaluations in a row without a new best."""
    problems_per_step: Count = 32
    """Problems in each step."""
    mini_batches: Count = 1
    """Parts into which a step's problems are split, with an optimizer update each."""
    inner_epochs: Count = 1
    """Passes over a step's rollouts (TRL's num_iterations)."""
    learning_rate: Positive = Field(5e-6, le=1)
    """Learning rate after the warm-up, its highest."""
    schedule: Literal["constant", "linear", "cosine"] | None = None
    """The course of the learning rate after the warm-up; none: linear where problems of data.varied
    hold the student, else constant."""
    warmup_steps: Natural = 0
    """Steps of linear warm-up."""
    weight_decay: NonNegative = 0.0
    """AdamW's weight decay."""
    beta1: Share = 0.9
    """AdamW's first beta."""
    beta2: Share = 0.999
    """AdamW's second beta."""
    max_grad_norm: NonNegative = 1.0
    """Clip the gradient's norm; 0 is off."""
    micro_batch_tokens: Count = 8192
    """Most tokens, padding included, in one forward pass."""
    share_prefixes: bool = True
    """Run each context once for all its rollouts, by our own exact attention instead of
    model.attention. --no-share turns it off."""
    prefix_kernel: Literal["auto", "tiles", "flash", "flash_3", "flash_attn", "flex"] = "auto"
    """Kernel of that attention: batched products (tiles, on any machine), torch's flash attention,
    the same with FlashAttention 3, the flash-attn package, or FlexAttention."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Weights and optimizer are fp32; bf16: forward, backward and rollouts in bf16; auto: bf16
    where it is faster (GPUs, AMX, AMD's AVX-512), else fp32, kept with the run."""
    optimizer: str = "adamw_torch_fused"
    """An optimizer of transformers' Trainer, such as adafactor or adamw_bnb_8bit."""
    gradient_checkpointing: Literal[False, True, "reentrant"] = False
    """Recompute activations in backward: less memory, a third more time. reentrant: by torch's
    older form of it."""
    sharding: Literal["none", "fsdp2", "zero1", "zero2", "zero3"] = "none"
    """Of several processes (torchrun, accelerate launch): none keeps all weights in each (DDP),
    fsdp2 splits weights, gradients and optimizer among them; DeepSpeed's zero1 splits the
    optimizer, zero2 gradients too, zero3 all."""
    not_finite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite: stop, or leave it out and go on; its batch is
    kept for `opsd replay`."""
    seed: int = Field(0, ge=0, lt=SEEDS)
    """Seed of data order and sampling."""
    save_every: Natural = 0
    """Steps between checkpoints, with one at the end; 0: only one on Ctrl-C or SIGTERM."""
    save_total_limit: Count = 2
    """Checkpoints kept."""
    collapse: CollapseSection = CollapseSection()
    """When a run counts as collapsed."""


class EvalSection(Section):
    """Held-out accuracy, measured before, after and during training."""

    source: str | None = None
    """Held-out problems, as data.source; none: taken from data.source."""
    columns: dict[str, str] | None = None
    """As data.columns, for eval.source."""
    split: str | None = None
    """As data.split, for eval.source; none: test, if it has splits."""
    options: dict[str, Any] | None = None
    """As data.options, for eval.source."""
    problems: Natural = 200
    """Held-out problems; 0: no evaluation."""
    every: Natural = 0
    """Steps between evaluations; 0: only before and after."""
    teacher: bool = False
    """Evaluate the teacher's prompt too, once, before training."""
    max_new_tokens: Count | None = None
    """Longest answer; none: the rollout's."""
    batch_size: Count = 64
    """Sequences decoded at once."""
    samples: Natural = 3
    """Held-out problems whose completions are kept for the report."""


class OutputSection(Section):
    """Where the results go."""

    dir: str = "runs/opsd"
    """The run's directory."""
    rollouts: Natural = 4
    """Rollouts of each step that rollouts.jsonl keeps, with their text, their reward and how they
    were drawn."""
    report_to: list[Literal["wandb", "tensorboard", "trackio", "mlflow", "comet_ml"]] = Field([])
    """Also log there: steps, evaluations and a table of completions; one name, or a list."""
    run_name: str | None = None
    """The run's name there; none: that of output.dir."""
    project: str = "opsd"
    """The project there, or MLflow's experiment. WANDB_PROJECT and the like take precedence."""
    tags: list[str] = Field([])
    """W&B's, MLflow's and Comet's tags of the run."""
    keep: Literal["last", "best", "both"] = "last"
    """Which weights to keep. last: the last step's, in model/; best: those of the best held-out
    evaluation, step 0 included, in model/; both: the best in best/model/."""
    merge: bool = False
    """model.lora: write the whole model, with the adapters merged, to model/, and the adapters to
    adapter/."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """The dtype of the weights in model/. auto: the base model's for a whole model, fp32 for
    adapters. Checkpoints keep the dtype of training."""
    push_to_hub: str | None = None
    """Upload model/ to this hub repository (owner/name) at the end."""
    hub_private: bool = True
    """Make that repository private, if it is new."""

    @field_validator("report_to", "tags", mode="before")
    @classmethod
    def _one(cls, names: Any) -> Any:
        names = re.split(r",\s*", names) if isinstance(names, str) else names
        if not isinstance(names, list):
            return names
        return ["comet_ml" if name == "comet" else name for name in names if name != "none"]
