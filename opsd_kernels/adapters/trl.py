"""TRL's distillation trainers (trl 1.16) without logits in memory:

    class Trainer(FusedSDFT, SDFTTrainer): ...                  # trl.experimental.sdft
    class Trainer(FusedGKD, GKDTrainer): ...                    # trl.experimental.gkd
    class Trainer(FusedDistillation, DistillationTrainer): ...  # trl

Each replaces only the computation of the loss: value, gradient and metrics are the same. The class
attribute `kernel_options` is passed to `linear_divergence` and `linear_log_prob` (`memory_budget`,
`backend`).

The model runs as usual, but its head gets an empty input. The head's real input is passed to the
fused functions, with the head's weight and the scale and soft cap in the model's config. The first
call compares the result with the model's own logits, to detect models that compute them in another
way.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn

from opsd_kernels import LogitTransform, linear_divergence, linear_log_prob, reference
from opsd_kernels.adapters import divergence_of

# --- The loss ---


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
    **kernel_options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, sum of the student's entropies, number of tokens): trl.trainer.distillation_trainer's
    function `_chunked_divergence_loss`, argument for argument.

    hidden states [B, K, D] and [B, K, D_t], weights [V, D] and [V, D_t], mask [B, K]. The loss is
    the sum over tokens of mask 1, divided by `num_items_in_batch` or else by their number. The
    heads take the hidden states' dtype; DTensor heads are not gathered.
    """
    shared = teacher_lm_head_weight is student_lm_head_weight
    shared = shared and teacher_lm_head_bias is student_lm_head_bias
    dtype = torch.promote_types(student_hidden_states.dtype, teacher_hidden_states.dtype)
    student, teacher, weight, teacher_weight, bias, teacher_bias = (
        None if x is None else x.to(dtype)
        for x in (
            student_hidden_states,
            teacher_hidden_states,
            student_lm_head_weight,
            None if shared else teacher_lm_head_weight,
            student_lm_head_bias,
            None if shared else teacher_lm_head_bias,
        )
    )
    counts = (completion_mask != 0).float()
    result = linear_divergence(
        student,
        teacher,
        weight,
        teacher_weight,
        bias=bias,
        teacher_bias=teacher_bias,
        temperature=temperature,
        logit_scale=student_logit_scale,
        logit_softcap=student_final_logit_softcapping,
        teacher_transform=LogitTransform(
            temperature, teacher_logit_scale, teacher_final_logit_softcapping
        ),
        token_weight=counts,
        reduction="sum",
        **divergence_of(beta),
        **kernel_options,
    )
    number = counts.sum().long()
    items = number.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    items = items.to(result.loss.device) if isinstance(items, Tensor) else items
    return result.loss / items, result.student_entropy.sum(), number


# --- The input of a model's head ---


def output_head(model: nn.Module) -> nn.Linear:
    """The head that the model uses now. It must be a plain linear layer, without an adapter. If it
    is in PEFT's `modules_to_save`, this is the active adapter's copy, or the original if adapters
    are off.
    """
    head = model.get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        active = [] if head.disable_adapters else head.active_adapters
        head = next((copies[name] for name in active if name in copies), head.original_module)
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"model: its head is a {type(head).__name__}, must be a torch.nn.Linear. With PEFT "
            "name the head in modules_to_save, which trains a copy of it, not in target_modules"
        )
    return head


def logit_transform(model: nn.Module) -> dict[str, Any]:
    """The logit scale and soft cap in the model's config, as arguments of `linear_divergence`."""
    config = model.config.get_text_config()
    scale = None
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None) if scale is None else scale
    scaling = getattr(config, "logits_scaling", None)
    if scale is None and scaling is not None:  # Granite divides by it, HyperCLOVA X multiplies
        scale = scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    return {
        "logit_scale": 1.0 if scale is None else scale,
        "logit_softcap": getattr(config, "final_logit_softcapping", None),
    }


def transform_of(model: nn.Module, temperature: float = 1.0) -> LogitTransform:
    """The same as a LogitTransform."""
    named = logit_transform(model)
    return LogitTransform(temperature, named["logit_scale"], named["logit_softcap"])


def head_inputs(model: nn.Module, head: nn.Linear, **inputs: Any) -> Tensor:
    """The input [B, L, D] of `head` when `model` is called with `inputs`. No logits are made."""
    return _run(model, head, lambda hidden: hidden[:, :0], inputs)[0]


@torch.no_grad()
def check_head(model: nn.Module, bare: nn.Module, input_ids: Tensor) -> None:
    """Raise ValueError if the logits of `model`, which may wrap the `bare` one, differ from those
    computed from its head and config.
    """
    head, transform = output_head(bare), transform_of(bare)
    few = {"input_ids": input_ids[:1, :16], "use_cache": False}
    hidden, logits = _run(model, head, lambda hidden: hidden, few)
    weight, bias = (_as(hidden, _whole(x)) for x in (head.weight, head.bias))
    made = reference.logits(hidden, weight, bias, transform).float()
    if not made.any():  # a head of zeros does not show scale and cap, so add noise
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(logits.shape[-1], generator=generator).to(hidden)
        hook = head.register_forward_hook(lambda module, inputs, output: output + noise)
        try:
            _, logits = _run(model, head, lambda hidden: hidden, few)
        finally:
            hook.remove()
        made = reference.transformed(noise, transform).float().expand(logits.shape)
    error = float((made - logits.float()).norm() / made.norm())
    if not error < 0.02:  # rounding in bf16 is less
        raise ValueError(
            f"model: {type(bare).__name__} makes its logits otherwise than its head and config say "
            f"(they differ by {error:.0%}), must not; use TRL's own trainer"
        )


def _run(
    model: nn.Module, head: nn.Linear, change: Callable[[Tensor], Tensor], inputs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(the head's input, the model's logits), where the head gets the changed input."""
    found: list[Tensor] = []

    def take(module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        found.append(arguments[0])
        return (change(arguments[0]),)

    hook = head.register_forward_pre_hook(take)
    try:
        logits = model(**inputs).logits
    finally:
        hook.remove()
    if len(found) != 1:
        raise ValueError(f"model: called its head {len(found)} times, must call it once")
    return found[0], logits


def _whole(x: Tensor | None) -> Tensor | None:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


# --- The trainers ---


class _Fused:
    """A trainer whose loss is fused. `replaces`: the names of TRL's methods that it replaces."""

    replaces: ClassVar[tuple[str, ...]] = ()
    kernel_options: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        trainers = [base for base in cls.__mro__ if not issubclass(base, _Fused)]
        lacking = [n for n in cls.replaces if not any(n in vars(base) for base in trainers)]
        if lacking and trainers != [object]:
            raise TypeError(
                f"{cls.__name__}: its trainer has no {', '.join(lacking)}, which trl 1.16's has; "
                "this version of TRL does not fit"
            )

    def _inside(self, model: nn.Module, method: Callable[..., Any], *arguments: Any) -> Any:
        """Call method(bare model, *arguments) as the forward of the model's wrapper, so that DDP
        and FSDP see all of it.
        """
        from trl.models.utils import _ForwardRedirection

        bare = self.accelerator.unwrap_model(model)
        return _ForwardRedirection()(model, bare, method, bare, *arguments)

    def _head_inputs(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        bare = self.accelerator.unwrap_model(model)
        checked = self.__dict__.setdefault("_checked", set())
        if id(bare) not in checked:
            check_head(model, bare, inputs["input_ids"])
            checked.add(id(bare))
        return head_inputs(model, output_head(bare), **inputs)


class FusedGKD(_Fused):
    """For GKDTrainer. As there, the loss is at temperature 1, whatever the sampling temperature."""

    replaces = ("compute_loss",)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Like GKDTrainer's; with `return_outputs` the outputs have no logits."""
        self.teacher_model.eval()
        loss = self._inside(model, self._fused_loss, inputs, num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _fused_loss(self, student: nn.Module, inputs: dict, num_items_in_batch) -> Tensor:
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        hidden = self._head_inputs(student, tokens)
        with torch.no_grad():
            teacher_hidden = self._head_inputs(self.teacher_model, tokens)
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        head, teacher_head = output_head(student), output_head(teacher)
        scales, teacher_scales = logit_transform(student), logit_transform(teacher)
        loss, _, _ = chunked_divergence_loss(
            hidden[:, :-1],
            teacher_hidden[:, :-1],
            head.weight,
            teacher_head.weight,
            inputs["labels"][:, 1:] != -100,
            self.beta,
            num_items_in_batch,
            head.bias,
            teacher_head.bias,
            scales["logit_scale"],
            teacher_scales["logit_scale"],
            scales["logit_softcap"],
            teacher_scales["logit_softcap"],
            **self.kernel_options,
        )
        return loss


class FusedSDFT(_Fused):
    """For SDFTTrainer with `distillation_mode` "full_logits" or "sampled_token"."""

    replaces = ("compute_loss", "_compute_rollout_logps")

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        mode = self.args.distillation_mode
        if mode not in ("full_logits", "sampled_token"):
            default = ", SDFTConfig's default" if mode == "topk_logits" else ""
            raise ValueError(
                f"distillation_mode: got {mode!r}{default}, must be 'full_logits' or "
                "'sampled_token' for FusedSDFT, which never has the logits that it needs. Write "
                'SDFTConfig(distillation_mode="full_logits", ...): the divergence over the whole '
                "vocabulary, which the top k approximate"
            )
        if self.use_teacher_server:
            raise ValueError("use_teacher_server: got True, must be False for FusedSDFT")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Like SDFTTrainer's."""
        if return_outputs:
            raise ValueError("return_outputs: got True, must be False: SDFTTrainer has no outputs")
        loss, metric = self._inside(model, self._fused_loss, inputs)
        mode = "train" if model.training else "eval"
        self._log_self_distillation_metric(mode, self.accelerator.gather(metric).mean().item())
        return loss / (self.current_gradient_accumulation_steps if self.model.training else 1.0)

    def _fused_loss(self, student: nn.Module, inputs: dict) -> tuple[Tensor, Tensor]:
        """Returns (loss, mean over tokens)."""
        targets, mask = inputs["completion_ids"], inputs["completion_mask"].float()
        first = self.num_loss_tokens_to_skip
        mask = mask * (torch.arange(mask.shape[1], device=mask.device) >= first)
        hidden = self._completion_states(student, *self._student_tokens(inputs), targets)
        with torch.no_grad(), self._get_teacher_context_for_self_distillation():
            teacher_tokens = inputs["teacher_input_ids"], inputs["teacher_attention_mask"]
            teacher_hidden = self._completion_states(self.teacher_model, *teacher_tokens, targets)
            # Inside the context: without its adapters a model may have another head.
            teacher_model = self.accelerator.unwrap_model(self.teacher_model)
            teacher_head = output_head(teacher_model)
        head = output_head(student)
        if self.args.distillation_mode == "sampled_token":
            log_prob = self._log_prob(student, head, hidden, targets)
            with torch.no_grad():
                teacher = self._log_prob(teacher_model, teacher_head, teacher_hidden, targets)
            ratio = self._importance(log_prob.detach(), inputs)
            per_token = (log_prob.detach() - teacher) * log_prob * ratio
            loss = (per_token * _shares(mask)).sum()
            return loss, ((per_token.detach() * mask).sum() / mask.sum().clamp(min=1)).detach()
        ratio = torch.ones_like(mask)
        if self._corrects(inputs):
            with torch.no_grad():
                ratio = self._importance(self._log_prob(student, head, hidden, targets), inputs)
        weight, bias = (_as(hidden, x) for x in (head.weight, head.bias))
        shared = teacher_head is head
        result = linear_divergence(
            hidden,
            teacher_hidden,
            weight,
            None if shared else _as(hidden, teacher_head.weight),
            bias=bias,
            teacher_bias=None if shared else _as(hidden, teacher_head.bias),
            temperature=self.temperature,
            teacher_transform=transform_of(teacher_model, self.temperature),
            token_weight=_shares(mask) * ratio,
            reduction="sum",
            **divergence_of(self.args.distillation_alpha),
            **logit_transform(student),
            **self.kernel_options,
        )
        total = (result.per_token * ratio * mask).sum()
        return result.loss, total / mask.sum().clamp(min=1)

    def _student_tokens(self, inputs: dict) -> tuple[Tensor, Tensor]:
        return (
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        )

    def _completion_states(
        self, model: nn.Module, ids: Tensor, mask: Tensor, targets: Tensor
    ) -> Tensor:
        """The states [B, K, D] that predict the K completion tokens."""
        length = targets.shape[1]
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if "logits_to_keep" in self.model_kwarg_keys:
            inputs["logits_to_keep"] = length + 1
        return self._head_inputs(model, inputs)[:, -length - 1 : -1]

    def _log_prob(self, model, head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
        """The log-probabilities [B, K] at the trainer's temperature."""
        return linear_log_prob(
            hidden,
            _as(hidden, head.weight),
            targets,
            bias=_as(hidden, head.bias),
            temperature=self.temperature,
            **logit_transform(model),
            **self.kernel_options,
        ).log_prob

    def _corrects(self, inputs: dict) -> bool:
        bound = self.args.distillation_is_clip
        return bound is not None and inputs.get("old_per_token_logps") is not None

    def _importance(self, log_prob: Tensor, inputs: dict) -> Tensor:
        """The ratios [B, K] of the student's current probabilities to those at sampling,
        clipped.
        """
        if not self._corrects(inputs):
            return torch.ones_like(log_prob)
        change = (log_prob - inputs["old_per_token_logps"]).clamp(-20.0, 20.0)
        return change.exp().clamp(max=self.args.distillation_is_clip)

    def _compute_rollout_logps(self, prompt_ids, prompt_mask, completion_ids, completion_mask):
        """Like SDFTTrainer's: computed only if a batch is trained on more than once."""
        generate_every = self.args.steps_per_generation * self.num_iterations
        if self.args.gradient_accumulation_steps % generate_every == 0:
            return None
        inputs = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask}
        inputs |= {"completion_ids": completion_ids, "completion_mask": completion_mask}

        def log_prob(student: nn.Module) -> Tensor:
            tokens = self._student_tokens(inputs)
            hidden = self._completion_states(student, *tokens, completion_ids)
            return self._log_prob(student, output_head(student), hidden, completion_ids)

        with torch.no_grad():
            return self._inside(self.model, log_prob)


class FusedDistillation(_Fused):
    """For DistillationTrainer: replaces its chunked loss by a faster one with the same result."""

    replaces = ("_compute_loss",)

    def _compute_loss(self, *arguments, **options):
        """Like DistillationTrainer's."""
        from trl.trainer import distillation_trainer

        fused = functools.partial(chunked_divergence_loss, **self.kernel_options)
        with mock.patch.object(distillation_trainer, "_chunked_divergence_loss", fused):
            return super()._compute_loss(*arguments, **options)


def _as(hidden: Tensor, x: Tensor | None) -> Tensor | None:
    """Cast a head's tensor to the hidden states' dtype, as autocast would."""
    return None if x is None else x.to(hidden.dtype)


def _shares(mask: Tensor) -> Tensor:
    """The weights [B, K] of tokens in a mean over sequences of the mean over their tokens."""
    return mask / mask.sum(-1, keepdim=True).clamp(min=1) / len(mask)
