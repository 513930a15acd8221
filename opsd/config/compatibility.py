"""Options that do not go together, each refused by its name. Needs no torch.

The fields' types, in sections.py, say what each may be; here is what goes together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opsd.common.templates import over_rollouts
from opsd.config.names import DIVERGENCE_METHODS
from opsd.config.requirements import is_graded, needs_grades, teaches_over_rollouts

if TYPE_CHECKING:
    from opsd.config.config import Config

USED_BY = {
    "divergence": DIVERGENCE_METHODS,
    "beta": DIVERGENCE_METHODS,
    "temperature": DIVERGENCE_METHODS,
    "clip": DIVERGENCE_METHODS,
    "clip_threshold": DIVERGENCE_METHODS,
    "epsilon": (*DIVERGENCE_METHODS, "grpo"),
    "epsilon_high": (*DIVERGENCE_METHODS, "grpo"),
    "kl": ("grpo",),
    "credit": ("grpo",),
    "credit_clip": ("grpo",),
    "credit_steps": ("grpo",),
    "scale_advantages": ("grpo",),
    "roles": ("sft",),
    "reward": (*DIVERGENCE_METHODS, "grpo"),
    "importance_bound": (*DIVERGENCE_METHODS, "grpo"),
}
"""Fields of `loss` → the methods that use them. Fields that are not here are used by all."""


ZERO_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""Optimizers that update each number of a weight independently of the others."""


def check(config: Config) -> None:
    """Raises ValueError that names the field, its value and what it may be."""
    _check_teacher(config)
    _check_engine(config)
    _check_group(config)
    _check_adapters(config)
    _check_teacher_memory(config)
    _check_methods(config)
    _check_divergence(config)
    _check_rewards(config)
    _check_policy_gradient(config)
    _check_templates(config)
    _check_updates(config)
    _check_zero(config)


def _check_teacher(config: Config) -> None:
    teacher = config.teacher
    if teacher.policy == "model" and teacher.path is None:
        raise ValueError(
            "teacher.path is missing: teacher.policy 'model' needs the model that teaches"
        )
    if teacher.policy != "model" and teacher.path is not None:
        raise ValueError(
            f"teacher.path is {teacher.path!r}: it is for teacher.policy 'model', not "
            f"{teacher.policy!r}"
        )
    if config.method == "distill" and teacher.policy != "model":
        raise ValueError(
            f"teacher.policy is {teacher.policy!r}: distill shows the teacher what the student "
            "sees, so it must be 'model', another model, with teacher.path"
        )
    if config.rollout.source != "student" and config.method not in DIVERGENCE_METHODS:
        raise ValueError(
            f"rollout.source is {config.rollout.source!r}: that is for opsd and distill; "
            f"{config.method} has its own"
        )


def _check_group(config: Config) -> None:
    if config.method == "grpo" and config.rollout.group_size < 2:
        raise ValueError(
            f"rollout.group_size is {config.rollout.group_size}: grpo compares a problem's "
            "rollouts with each other and needs at least 2"
        )


def _check_engine(config: Config) -> None:
    rollout = config.rollout
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
    if rollout.engine.startswith("vllm") and config.model.gguf_file is not None:
        raise ValueError(
            f"model.gguf_file is {config.model.gguf_file!r}: vLLM is given weights under the "
            "names of a transformers directory; save the model as one first"
        )


def _check_adapters(config: Config) -> None:
    model, output = config.model, config.output
    if model.lora is None:
        if output.merge:
            raise ValueError("output.merge is true: without model.lora there is nothing to merge")
        return
    if model.gguf_file is not None:
        raise ValueError(
            f"model.gguf_file is {model.gguf_file!r}: an adapter must find its model again as "
            "a transformers directory or on the hub; save the model as one first"
        )
    if model.lora.dropout and config.method != "sft":
        raise ValueError(
            f"model.lora.dropout is {model.lora.dropout:g}: method {config.method!r} scores what "
            "was sampled, and rollouts are sampled without dropout; set it to 0 (dropout is for "
            "method sft)"
        )
    if model.lora.quantize != "none" and config.rollout.engine.startswith("vllm"):
        raise ValueError(
            f"rollout.engine is {config.rollout.engine!r}: weights in 4 bits "
            "(model.lora.quantize) cannot be given to it (allowed: generate, continuous)"
        )
    if model.lora.quantize != "none" and config.train.sharding != "none":
        raise ValueError(
            f"train.sharding is {config.train.sharding!r}: weights in 4 bits "
            "(model.lora.quantize) cannot be split; train with none"
        )


def _check_teacher_memory(config: Config) -> None:
    teacher = config.teacher
    for name, off in (("quantize", "none"), ("offload", False)):
        value = getattr(teacher, name)
        if value == off:
            continue
        if teacher.policy not in ("initial", "model"):
            raise ValueError(
                f"teacher.{name} is {value!r}: it is for teacher.policy 'initial' or 'model', "
                f"not {teacher.policy!r}"
            )
        if teacher.policy == "initial" and config.model.lora is not None:
            raise ValueError(
                f"teacher.{name} is {value!r}: with model.lora the initial teacher is the "
                "student's own frozen weights, and there is no other copy of them"
            )


def _check_methods(config: Config) -> None:
    for name, methods in USED_BY.items():
        if config.method not in methods:
            _refuse_changed(
                config.loss,
                name,
                "loss",
                f"that is for {' and '.join(methods)}, not for {config.method}",
            )
    if config.method == "sft":
        for name in ("correct", "incorrect", "truncated"):
            _refuse_changed(
                config.loss.weights, name, "loss.weights", "sft has no rollouts to be weighed"
            )
    if config.method != "grpo":
        _refuse_changed(
            config.rollout, "dynamic_sampling", "rollout", f"{config.method} has no use for it"
        )


def _check_divergence(config: Config) -> None:
    loss = config.loss
    if loss.divergence != "jsd":
        why = f"it is for loss.divergence 'jsd', not {loss.divergence!r}"
        _refuse_changed(loss, "beta", "loss", why)
    if loss.clip == "none":
        _refuse_changed(loss, "clip_threshold", "loss", "loss.clip is 'none'")
    if config.method == "grpo":
        return
    if loss.divergence != "sampled_token":
        for name in ("epsilon", "epsilon_high"):
            _refuse_changed(
                loss,
                name,
                "loss",
                "over the whole vocabulary no ratio is clipped; that is for "
                "loss.divergence 'sampled_token', and for grpo",
            )
        return
    for name in ("clip", "temperature"):
        _refuse_changed(
            loss,
            name,
            "loss",
            "loss.divergence 'sampled_token' takes log-probabilities of "
            "the rollout's tokens as they are",
        )
    if config.rollout.source != "student":
        raise ValueError(
            f"rollout.source is {config.rollout.source!r}: loss.divergence 'sampled_token' is a "
            "policy gradient, which is right for the student's own rollouts only"
        )


def _check_rewards(config: Config) -> None:
    reward, weights = config.loss.reward, config.loss.weights
    if config.method == "sft":
        return
    if weights.correct == weights.incorrect == 0:
        raise ValueError(
            "loss.weights.correct is 0.0 and loss.weights.incorrect too: nothing would be learnt"
        )
    if config.rollout.source == "reference" and needs_grades(config):
        raise ValueError(
            "rollout.source is 'reference': weights by correctness and a teacher template over "
            "rollouts need rollouts"
        )
    if not is_graded(config):
        for name in type(reward).model_fields:
            _refuse_changed(
                reward,
                name,
                "loss.reward",
                f"{config.method} grades no rollouts, unless "
                "loss.weights.correct or .incorrect, a teacher template over `rollout` or `peers`, "
                "or loss.reward.log asks for it",
            )
    if config.method != "grpo":
        for name in ("format", "overlong_buffer"):
            _refuse_changed(reward, name, "loss.reward", "that is a part of grpo's reward")
    longest = config.rollout.max_new_tokens
    if reward.overlong_buffer is not None and reward.overlong_buffer > longest:
        raise ValueError(
            f"loss.reward.overlong_buffer is {reward.overlong_buffer}: it may be at most "
            f"rollout.max_new_tokens ({longest})"
        )


def _check_policy_gradient(config: Config) -> None:
    loss, policy = config.loss, config.teacher.policy
    if loss.kl and policy == "live":
        raise ValueError(
            f"loss.kl is {loss.kl}: with teacher.policy 'live' the reference is the student "
            "itself; it may be 'initial', 'ema' or 'model'"
        )
    for name in ("credit_clip", "credit_steps"):
        if not loss.credit:
            _refuse_changed(loss, name, "loss", "without loss.credit it does nothing")
    high = loss.epsilon if loss.epsilon_high is None else loss.epsilon_high
    if high < loss.epsilon:
        raise ValueError(
            f"loss.epsilon_high is {high}: it must be at least loss.epsilon ({loss.epsilon})"
        )


def _check_templates(config: Config) -> None:
    for name in ("student", "target"):
        if over_rollouts(getattr(config.prompts, name)):
            raise ValueError(
                f"prompts.{name} uses `rollout` or `peers`: it is filled in before there are "
                "rollouts; only prompts.teacher may"
            )
    if not over_rollouts(config.prompts.teacher):
        return
    if not teaches_over_rollouts(config) or config.method == "sft":
        raise ValueError(
            f"prompts.teacher uses `rollout` or `peers`: {config.method} fills it in before there "
            "are rollouts, or not at all"
        )
    if config.eval.teacher:
        raise ValueError(
            "eval.teacher is true: prompts.teacher uses `rollout` or `peers`, and held-out "
            "problems have none"
        )
    if config.rollout.source != "student":
        raise ValueError(
            f"rollout.source is {config.rollout.source!r}: prompts.teacher uses `rollout` or "
            "`peers`, so the student must have written them"
        )


def _check_updates(config: Config) -> None:
    train, teacher = config.train, config.teacher
    if train.warmup_steps > train.steps:
        raise ValueError(
            f"train.warmup_steps is {train.warmup_steps}: it may be at most train.steps "
            f"({train.steps})"
        )
    if train.mini_batches > train.problems_per_step:
        raise ValueError(
            f"train.mini_batches is {train.mini_batches}: it may be at most "
            f"train.problems_per_step ({train.problems_per_step})"
        )
    if teacher.policy != "ema":
        for name in ("ema_decay", "update_every"):
            _refuse_changed(
                teacher, name, "teacher", f"it is for teacher.policy 'ema', not {teacher.policy!r}"
            )


def _check_zero(config: Config) -> None:
    train, model = config.train, config.model
    if not train.sharding.startswith("zero"):
        return
    if model.lora is not None:
        raise ValueError(
            f"train.sharding is {train.sharding!r}: with model.lora all that it would split is the "
            "adapters' gradients and moments, which are small (allowed: none, fsdp2)"
        )
    if train.optimizer not in ZERO_OPTIMIZERS:
        raise ValueError(
            f"train.optimizer is {train.optimizer!r}: under train.sharding {train.sharding!r} an "
            "optimizer sees flat pieces of the weights, no matrices (allowed: "
            f"{', '.join(ZERO_OPTIMIZERS)})"
        )


def _refuse_changed(section, name: str, place: str, why: str) -> None:
    """Refuse a field that is not at its default: it would be accepted and ignored."""
    value = getattr(section, name)
    if value != type(section).model_fields[name].get_default():
        shown = value.model_dump(exclude_defaults=True) if hasattr(value, "model_dump") else value
        raise ValueError(f"{place}.{name} is {shown!r}: {why}")
