"""Refuse combinations of options that make no sense, naming the option. Needs no torch.

The types of the fields, in sections.py and loss.py, check each value alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from opsd.common.errors import UserError
from opsd.common.files import read_toml
from opsd.common.templates import SOLUTION_NAMES, check_shows, names, over_rollouts
from opsd.common.urls import is_address
from opsd.config import requirements
from opsd.config.foreign import VALUES
from opsd.config.names import DIVERGENCE_METHODS, HOTTEST, SERVERS

if TYPE_CHECKING:
    from opsd.config.config import Config

_USES: dict[str, str] = read_toml(__file__, "used_by")
USED_BY = {field: tuple(of.split()) for fields, of in _USES.items() for field in fields.split()}
"""Fields of `loss` → the methods that use them. All methods use the fields not listed here."""

ZERO_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""Optimizers that update each number of a weight independently of the others."""


def check(config: Config) -> None:
    """Raises ValueError that names the field, its value and what it may be.

    A rule yields texts for `refused`. A field that this run does not use is refused unless it has
    its default value: otherwise it would be silently ignored.
    """
    for rule in RULES:
        for broken in rule(config):
            raise refused(config, broken)
    for fields, why in _unused(config):
        for field in fields.split():
            section, _, name = field.rpartition(".")
            default = type(_value(config, section)).model_fields[name].get_default()
            if _value(config, field) != default:
                raise refused(config, f"{field}: {why}")


def check_without_gpu(config: Config) -> None:
    """Raises UserError for what cannot be done on a machine without a GPU."""
    if config.model.lora is not None and config.model.lora.quantize == "nf4":
        said = "model.lora.quantize: weights in 4 bits (QLoRA) need a GPU, and there is none"
        raise refused(config, f"{said}; train with 'none'")
    if config.teacher.offload:
        said = "there is no GPU, the teacher is in the CPU's memory anyway"
        raise refused(config, f"teacher.offload: {said}")
    if config.model.attention == "flash_attention_2":
        said = "it needs a GPU, and there is none; 'sdpa' runs everywhere"
        raise refused(config, f"model.attention: {said}")


def refused(config: Config, broken: str) -> UserError:
    """The error for the text `field: why`, with the field's value added."""
    field, _, why = broken.partition(": ")
    return UserError(f"{field} is {_shown(_value(config, field))}: {why}")


def _value(config: Config, field: str) -> Any:
    return reduce(getattr, field.split("."), config)


def _shown(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_defaults=True)
    elif isinstance(value, dict):
        value = to_jsonable_python(value, exclude_none=True)
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return "missing" if value is None else "true" if value is True else repr(value)


def _teacher(config: Config) -> Iterator[str]:
    teacher, policy = config.teacher, config.teacher.policy
    if policy == "model" and teacher.path is None and not (teacher.mix or teacher.routes):
        yield "teacher.path: teacher.policy 'model' needs the model that teaches"
    if policy != "model" and teacher.path is not None:
        yield f"teacher.path: it is for teacher.policy 'model', not {policy!r}"
    if config.method == "distill" and policy != "model" and not (teacher.routes or teacher.mix):
        sees = "distill shows the teacher what the student sees"
        yield f"teacher.policy: {sees}: it is 'model', and teacher.path=MODEL names it"
    remote = is_address(teacher.members()[0].path)
    if remote and config.rollout.source == "teacher":
        yield "rollout.source: a teacher at an address (teacher.path) scores, and does not sample"
    if remote and config.eval.teacher:
        yield "eval.teacher: a teacher at an address (teacher.path) scores, and does not sample"
    for name, value in (("quantize", "none"), ("offload", False), ("revision", None)):
        if remote and getattr(teacher, name) != value:
            yield f"teacher.{name}: teacher.path is an address, whose server decides that"
    if config.rollout.source != "student" and config.method not in DIVERGENCE_METHODS:
        yield f"rollout.source: that is for opsd and distill; {config.method} has its own"


def _mixture(config: Config) -> Iterator[str]:
    mix, teacher, known = config.teacher.mix, config.teacher, config.prompts.contexts
    if not mix:
        if known:
            yield "prompts.contexts: they are for teacher.mix, which has no members"
        return
    if config.method == "sft":
        yield "teacher.mix: sft has no teacher"
    if config.method == "grpo" and not (config.loss.credit or config.loss.distil):
        yield "teacher.mix: grpo has a teacher only with loss.distil or loss.credit"
    if config.rollout.source == "teacher":
        yield "rollout.source: a mixture (teacher.mix) scores, and does not sample"
    if unused := [name for name in known if name not in requirements.teacher_roles(config)]:
        yield f"prompts.contexts: no member of teacher.mix has the context {unused[0]!r}"
    each = zip(mix, teacher.members(), requirements.teacher_roles(config), strict=True)
    for number, (member, weights, context) in enumerate(each):
        place = f"teacher.mix: member {number}"
        allowed = ["teacher", "student", *known]
        if context not in allowed:
            yield f"{place} has the context {context!r} (allowed: {', '.join(allowed)})"
        if weights.policy == "model" and weights.path is None:
            yield f"{place} has policy 'model' and no path"
        if weights.policy != "model" and member.path is not None:
            yield f"{place} has a path, which is for policy 'model', not {weights.policy!r}"
        if isinstance(member.coefficient, list) != (member.steps is not None):
            yield f"{place}: a coefficient of two numbers needs steps, and only such a one"
    fixed = [m for m in mix if not isinstance(m.coefficient, str)]
    for end in (0, float("inf")) if fixed == mix else ():
        if (total := sum(member.coefficient_at(end) for member in mix)) <= 0:
            yield f"teacher.mix: the coefficients add up to {total:g}; they should add up to 1"
    if len(damped := [member for member in mix if member.damping]) == len(mix) or len(damped) > 1:
        yield "teacher.mix: damping is for one member, beside others that are not damped"
    kinds = {weights.policy for weights in teacher.members()}
    split = config.train.sharding in ("fsdp2", "zero3") and config.model.lora is None
    if split and "live" in kinds and len(kinds) > 1:
        yield "train.sharding: a live member of teacher.mix needs none, zero1, zero2, or model.lora"


def _routes(config: Config) -> Iterator[str]:
    teacher, method, source = config.teacher, config.method, config.data.source
    sources = [] if isinstance(source, str) else source
    for name in (one.teacher for one in sources if one.teacher is not None):
        if name not in teacher.routes:
            yield f"teacher.routes: a source (data.source) has the teacher {name!r}"
    if not teacher.routes:
        return
    if method not in DIVERGENCE_METHODS:
        yield f"teacher.routes: they are for {' and '.join(DIVERGENCE_METHODS)}, not for {method}"
    if teacher.mix:
        yield "teacher.routes: several teachers are rows' own, teacher.mix is one for all rows"
    if teacher.path is not None:
        yield "teacher.path: each of teacher.routes names its own"
    if config.rollout.source == "teacher":
        yield "rollout.source: several teachers (teacher.routes) score, and do not sample"
    for name, own in zip(teacher.routes, teacher.members(), strict=True):
        place, path = f"teacher.routes: {name!r}", teacher.routes[name].path
        if not name.strip():
            yield f"{place} is no name"
        if own.policy == "model" and path is None:
            yield f"{place} has policy 'model' and no path"
        if own.policy != "model" and path is not None:
            yield f"{place} has a path, which is for policy 'model', not {own.policy!r}"
        if own.policy == "live" and method == "distill":
            yield f"{place} is the student itself, which sees what the student sees"


def _rollouts(config: Config) -> Iterator[str]:
    rollout, engine = config.rollout, config.rollout.engine
    others = engine not in ("generate", "continuous")
    if engine in SERVERS and rollout.server is None:
        yield f"rollout.server: rollout.engine {engine} needs it: rollout.server={SERVERS[engine]}"
    for name in ("server", "weights_dir"):
        if getattr(rollout, name) is not None and engine not in SERVERS:
            yield f"rollout.{name}: it is for rollout.engine {' or '.join(SERVERS)}, not {engine!r}"
    if engine.startswith("vllm") and rollout.temperature > HOTTEST:
        yield f"rollout.temperature: vLLM draws at temperatures up to {HOTTEST:g}"
    if others and rollout.source != "student":
        yield f"rollout.engine: rollout.source {rollout.source!r} needs 'generate' or 'continuous'"
    if others and config.model.gguf_file is not None:
        yield "model.gguf_file: rollout.engine takes a transformers directory; save it as one first"
    if rollout.ahead:
        yield from _ahead(config)
    if config.method == "grpo" and rollout.group_size < 2:
        yield "rollout.group_size: grpo compares a problem's rollouts; it needs at least 2"


def _ahead(config: Config) -> Iterator[str]:
    if config.rollout.engine not in SERVERS:
        yield f"rollout.ahead: only a server samples while a step trains: {' or '.join(SERVERS)}"
    if config.method == "sft":
        yield "rollout.ahead: sft has no rollouts"
    if config.loss.importance_bound is None:
        yield "rollout.ahead: its rollouts are a step old: loss.importance_bound must correct that"


def _adapters(config: Config) -> Iterator[str]:
    model, lora = config.model, config.model.lora
    if lora is None:
        if config.output.merge:
            yield "output.merge: without model.lora there is nothing to merge"
        return
    if model.gguf_file is not None:
        yield "model.gguf_file: an adapter needs a transformers directory; save it as one first"
    if lora.dropout and config.method != "sft":
        yield "model.lora.dropout: rollouts are sampled without dropout; it is for method sft"
    if lora.quantize != "none" and config.rollout.engine not in ("generate", "continuous"):
        yield "rollout.engine: weights in 4 bits (model.lora.quantize) need generate or continuous"
    if lora.quantize != "none" and config.train.sharding != "none":
        yield "train.sharding: weights in 4 bits (model.lora.quantize) cannot be split; use none"


def _teacher_memory(config: Config) -> Iterator[str]:
    teacher = config.teacher
    policies = {member.policy for member in teacher.members()}
    for name, off in (("quantize", "none"), ("offload", False)):
        if getattr(teacher, name) == off:
            continue
        if not policies & {"initial", "model"}:
            yield f"teacher.{name}: it is for teacher.policy 'initial' or 'model'"
        elif "model" not in policies and config.model.lora is not None:
            yield f"teacher.{name}: with model.lora the initial teacher has no weights of its own"


def _rewards(config: Config) -> Iterator[str]:
    reward, weights = config.loss.reward, config.loss.weights
    if config.method == "sft":
        return
    if weights.correct == weights.incorrect == 0:
        yield ("loss.weights.correct: loss.weights.incorrect is 0 too, so nothing would be learnt")
    if config.rollout.source == "reference" and requirements.needs_grades(config):
        yield "rollout.source: weights by correctness, and templates over rollouts, need rollouts"
    longest = config.rollout.max_new_tokens
    if reward.overlong_buffer is not None and reward.overlong_buffer > longest:
        yield f"loss.reward.overlong_buffer: it may be at most rollout.max_new_tokens ({longest})"


def _policy_gradient(config: Config) -> Iterator[str]:
    loss = config.loss
    sampled_token = config.method != "grpo" and loss.divergence == "sampled_token"
    if sampled_token and config.rollout.source != "student":
        yield "rollout.source: a policy gradient (sampled_token) needs the student's own rollouts"
    if loss.kl and config.teacher.members()[0].policy == "live":
        yield "loss.kl: the reference is the student itself; teacher.policy: initial, ema or model"
    if loss.epsilon_high is not None and loss.epsilon_high < loss.epsilon:
        yield f"loss.epsilon_high: it must be at least loss.epsilon ({loss.epsilon})"


def _templates(config: Config) -> Iterator[str]:
    prompts = config.prompts
    for name in ("student", "target"):
        if over_rollouts(getattr(prompts, name)):
            raise ValueError(f"prompts.{name} uses `rollout` or `peers`: only prompts.teacher may")
    for name, text in requirements.own_templates(config).items():
        check_shows(f"prompts.{name}", text, "problem" if name == "student" else "solution")
    if requirements.waits_for_rollouts(config, prompts.teacher):
        check_shows("prompts.teacher", prompts.teacher, "problem")
    over = over_rollouts(prompts.teacher)
    if over and (not requirements.uses_teacher_prompt(config) or config.method == "sft"):
        raise ValueError(f"prompts.teacher uses `rollout` or `peers`: {config.method} has none")
    if over and config.eval.teacher:
        yield "eval.teacher: prompts.teacher uses `rollout` or `peers`; held-out problems have none"
    if not requirements.teaches_over_rollouts(config) or config.method == "sft":
        return
    if config.rollout.source != "student":
        yield "rollout.source: prompts.teacher uses `rollout` or `peers`, which the student writes"


def _majority(config: Config) -> Iterator[str]:
    if not requirements.votes(config):
        return
    taught = {} if config.method == "sft" else requirements.teaching_templates(config)
    if not any(requirements.waits_for_rollouts(config, text) for text in taught.values()):
        yield "prompts.majority: no teacher is shown `solution` or `answer`"
    if config.rollout.source != "student":
        yield "rollout.source: prompts.majority is a vote of the student's rollouts"
    if config.rollout.group_size < 2:
        yield "rollout.group_size: prompts.majority is a vote of at least 2 rollouts of a problem"
    if config.eval.teacher and requirements.waits_for_rollouts(config, config.prompts.teacher):
        yield "eval.teacher: prompts.majority waits for rollouts, and held-out problems have none"


def _held(config: Config) -> Iterator[str]:
    hold = config.prompts.hold
    taught = {} if config.method == "sft" else requirements.teaching_templates(config)
    if hold and not any(names(text) & SOLUTION_NAMES for text in taught.values()):
        yield "prompts.hold: no teacher is shown `solution` or `answer`"
    if config.data.varied and (why := requirements.unvaried(config)) is not None:
        yield f"data.varied: {why}"
    if hold and {member.policy for member in config.teacher.members()} == {"live"}:
        yield "prompts.hold: a live teacher is the student itself, and holds it nowhere"


def _updates(config: Config) -> Iterator[str]:
    train = config.train
    if train.warmup_steps > train.steps:
        yield f"train.warmup_steps: it may be at most train.steps ({train.steps})"
    if train.mini_batches > (most := train.problems_per_step):
        yield f"train.mini_batches: it may be at most train.problems_per_step ({most})"
    if config.loss.router_aux and train.gradient_checkpointing == "reentrant":
        yield "train.gradient_checkpointing: its older form gives loss.router_aux no gradient"
    if not train.sharding.startswith("zero"):
        return
    if config.model.lora is not None:
        yield "train.sharding: what model.lora leaves to split is small (allowed: none, fsdp2)"
    if train.optimizer not in ZERO_OPTIMIZERS:
        allowed = ", ".join(ZERO_OPTIMIZERS)
        yield f"train.optimizer: {train.sharding} has flat pieces of weights (allowed: {allowed})"


def _images(config: Config) -> Iterator[str]:
    if not requirements.shows_images(config):
        return
    if config.rollout.engine != "generate":
        yield "rollout.engine: of rows with images (columns.images) 'generate' alone samples"
    if config.train.sharding != "none":
        yield "train.sharding: rows with images (columns.images) train in one process"
    if config.model.lora is not None and config.model.lora.quantize != "none":
        yield "model.lora.quantize: it is not tried with rows of images (columns.images)"
    if config.loss.router_aux:
        yield "loss.router_aux: it is not tried with rows of images (columns.images)"
    for member in config.teacher.members():
        if is_address(member.path):
            yield "teacher.path: a teacher at an address is shown no images (columns.images)"
        if member.quantize != "none" or member.offload:
            field = "offload" if member.offload else "quantize"
            yield f"teacher.{field}: it is not tried with rows of images (columns.images)"
    if config.model.gguf_file is not None:
        yield "model.gguf_file: it has no processor of images (columns.images)"


def _optimizer(config: Config) -> Iterator[str]:
    if meant := VALUES["train.optimizer"].get(config.train.optimizer):
        yield f"train.optimizer: did you mean {meant!r}?"


RULES = [
    _optimizer,
    _images,
    _teacher,
    _mixture,
    _routes,
    _rollouts,
    _adapters,
    _teacher_memory,
    _rewards,
]
RULES += [_policy_gradient, _templates, _majority, _held, _updates]


def _unused(config: Config) -> Iterator[tuple[str, str]]:
    """Yields (fields that this run does not use, separated by blanks; why not)."""
    method, loss, teacher = config.method, config.loss, config.teacher
    if not (config.eval.every and config.eval.problems):
        yield "output.keep train.early_stop", "that needs eval.every, and eval.problems"
    if method == "grpo":
        yield "loss.beta", "that is jsd's mixture; the weight of the KL to the reference is loss.kl"
    if teacher.policy in ("live", "ema") and not requirements.scores_by_teacher(config):
        yield "teacher.policy", f"{method} runs no teacher here"
    if not config.output.report_to:
        yield "output.run_name output.project output.tags", "that needs output.report_to"
    if not {"wandb", "mlflow", "comet_ml"} & {*config.output.report_to}:
        yield "output.tags", "that is for wandb, mlflow and comet_ml"
    for name, methods in USED_BY.items():
        distils = loss.distil > 0 and method == "grpo" and methods == DIVERGENCE_METHODS
        if method not in methods and not distils:
            yield f"loss.{name}", f"that is for {' and '.join(methods)}, not for {method}"
    if method == "sft":
        weights = "loss.weights.correct loss.weights.incorrect loss.weights.truncated"
        yield weights, "sft has no rollouts to be weighed"
    if method != "grpo":
        yield "rollout.dynamic_sampling", f"{method} has no use for it"
        grpo_alone = "loss.reward.format loss.reward.overlong_buffer"
        if requirements.is_graded(config):
            yield grpo_alone, "that is a part of grpo's reward"
    if loss.divergence != "jsd" and method in DIVERGENCE_METHODS:
        yield "loss.beta", f"it is for loss.divergence 'jsd', not {loss.divergence!r}"
    for kind, name in (("sampled_token", "loss.control_variate"), ("reverse_kl", "loss.unsure")):
        if loss.divergence != kind:
            yield name, f"it is for loss.divergence {kind!r}"
    at_address = any(is_address(own.path) for own in teacher.members())
    for used, fields, why in (
        (at_address, "teacher.server_patience", "no teacher is at an address"),
        (teacher.routes, "teacher.column loss.weights.balance", "there are no teacher.routes"),
        (loss.unsure, "loss.unsure_entropy", "loss.unsure is 0"),
        (loss.clip != "none", "loss.clip_threshold", "loss.clip is 'none'"),
        (loss.distil, "loss.distil_groups", "without loss.distil nothing distils"),
        (loss.credit, "loss.credit_clip loss.credit_steps", "without loss.credit it does nothing"),
    ):
        if not used:
            yield fields, why
    ratio, whole = "loss.epsilon loss.epsilon_high", "over the whole vocabulary no ratio is clipped"
    if method != "grpo" and loss.divergence != "sampled_token":
        yield ratio, f"{whole}; that is for loss.divergence 'sampled_token', and for grpo"
    elif method != "grpo":
        as_they_are = "takes log-probabilities of the rollout's tokens as they are"
        yield "loss.clip loss.temperature", f"loss.divergence 'sampled_token' {as_they_are}"
    if not requirements.is_graded(config) and method != "sft":
        of_votes = ("strict", "keep_special_tokens") if requirements.votes(config) else ()
        graded = [name for name in type(loss.reward).model_fields if name not in of_votes]
        yield (
            " ".join(f"loss.reward.{name}" for name in graded),
            f"{method} grades no rollouts but for weights, templates over them or loss.reward.log",
        )
    if "ema" not in {member.policy for member in teacher.members()}:
        averaged = "teacher.ema_decay teacher.update_every"
        yield averaged, f"it is for teacher.policy 'ema', not {teacher.policy!r}"
