"""Checks a caller's arguments. Each message names the argument, its value, and what is allowed."""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from opsd_kernels import gemm
from opsd_kernels.divergence import Divergence

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
LEAST_SHARE = 1e-4  # the least share of a role in jsd's mixture, except in fp64
HOLD_IT = ("weight", "last_hidden_state")  # a layer's tensor, and a model's output's
IGNORED = -100  # the target of a token that does not count, as in Hugging Face's labels


def describe(x: Tensor) -> str:
    """Dtype, shape and device, for messages."""
    return f"{x.dtype} {list(x.shape)} on {x.device}"


def check_tensors(needed: dict[str, Any], **optional: Any) -> None:
    """Check that all are dense tensors; the optional ones may be None."""
    for name, x in (needed | {k: x for k, x in optional.items() if x is not None}).items():
        if not isinstance(x, Tensor):
            may = "" if name in needed else ", or None"
            held = next((one for one in HOLD_IT if isinstance(getattr(x, one, None), Tensor)), "")
            hint = f"; give its .{held}" if held else ""
            raise ValueError(f"{name}: got {type(x).__name__}, must be a tensor{may}{hint}")
        if x.layout != torch.strided:
            raise ValueError(f"{name}: got a tensor of layout {x.layout}, must be dense (strided)")
        _refuse_forward_mode(name, x)


def _refuse_forward_mode(name: str, x: Tensor) -> None:
    """Raise RuntimeError for a forward-mode tangent: its derivative would silently be 0."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
        raise RuntimeError(
            f"{name}: has a forward-mode tangent (torch.func.jvp, jacfwd, forward_ad), which "
            "opsd_kernels does not support: use backward"
        )


def check_beta(divergence: Divergence, dtype: torch.dtype) -> None:
    """Check that jsd's mixture differs from each of its two parts by more than rounding."""
    least = LEAST_SHARE
    if divergence.name == "jsd" and dtype != torch.float64:
        if not least <= divergence.beta <= 1 - least:
            raise ValueError(
                f"beta: got {divergence.beta!r}, must lie between {least:g} and 1 - {least:g} for "
                f"{str(dtype).removeprefix('torch.')} tensors: beyond them the divergence is below "
                "fp32's rounding (float64 tensors may have any; for a KL ask for "
                "divergence='forward_kl' or 'reverse_kl')"
            )


def check_hidden(name: str, hidden: Tensor) -> None:
    """Check that the tensor is [..., D] in a dtype that the kernels accept."""
    if hidden.dim() < 1 or hidden.dtype not in DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"{name}: got {describe(hidden)}, must be [..., D] in {allowed}")


def check_head(
    hidden_name: str,
    hidden: Tensor,
    name: str,
    weight: Tensor,
    bias_name: str,
    bias: Tensor | None,
    sharded: bool = False,
) -> None:
    """Check that the head `weight` [V, D], `bias` [V] fits `hidden` [..., D]. A shard may be
    empty.
    """
    if weight.dim() != 2 or (weight.shape[0] == 0 and not sharded):
        raise ValueError(f"{name}: got {describe(weight)}, must be [V, D] with V > 0")
    if weight.shape[1] != hidden.shape[-1]:
        turned = weight.shape[0] == hidden.shape[-1]
        hint = f"; give hidden states, not logits, or {name}.T if it is [D, V]" if turned else ""
        raise ValueError(
            f"{name}: got {describe(weight)}, must be [V, {hidden.shape[-1]}] to fit "
            f"{hidden_name} {list(hidden.shape)}{hint}"
        )
    check_alike(name, weight, hidden_name, hidden)
    if bias is not None:
        if list(bias.shape) != [weight.shape[0]]:
            raise ValueError(
                f"{bias_name}: got {describe(bias)}, must be [{weight.shape[0]}] as {name} has rows"
            )
        check_alike(bias_name, bias, hidden_name, hidden)


def check_alike(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Check that both have the same dtype and device."""
    if x.dtype != other.dtype or x.device != other.device:
        raise ValueError(
            f"{name}: got {describe(x)}, must be {other.dtype} on {other.device} like {other_name}"
        )


def check_rows(name: str, x: Tensor, hidden_name: str, hidden: Tensor) -> None:
    """Check that there is one value for each token, on the tokens' device."""
    if x.shape != hidden.shape[:-1] or x.device != hidden.device:
        raise ValueError(
            f"{name}: got {describe(x)}, must be {list(hidden.shape[:-1])} on {hidden.device}, "
            f"one for each token of {hidden_name}"
        )


def check_targets(targets: Tensor, token_weight: Tensor | None, vocabulary: int | None) -> None:
    """Check that targets are integers in [0, V) where they count: where the weight is not 0, or
    without weights where they are not IGNORED. The range is checked only on the CPU, since
    elsewhere it would wait for the device; not if V is split over ranks (None); and not for fake
    tensors, which have no values. In those cases a token whose target is outside gets NaN.
    """
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets: got {describe(targets)}, must be integers")
    readable = targets.device.type == "cpu" and type(targets) is Tensor
    if vocabulary is None or not readable or torch.compiler.is_compiling():
        return
    counted = targets[targets != IGNORED if token_weight is None else token_weight != 0]
    if counted.numel():
        low, high = int(counted.min()), int(counted.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"targets: got values from {low} to {high}, must lie in [0, {vocabulary - 1}]; "
                f"give ignored tokens a token_weight of 0 (or {IGNORED} and no token_weight at all)"
            )


def wants_gradient(x: Tensor | None) -> bool:
    """Whether autograd will compute a gradient for this tensor."""
    return x is not None and torch.is_grad_enabled() and x.requires_grad


def check_reduction(reduction: str) -> None:
    """Check that it is one of REDUCTIONS."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, may be one of {', '.join(REDUCTIONS)}")


def row_weights(
    token_weight: Tensor | None, reduction: str, hidden_name: str, hidden: Tensor
) -> Tensor:
    """The weight [N] of each token in the reduction, as constants without a gradient."""
    n_tokens, dtype = hidden.shape[:-1].numel(), gemm.tile_dtype(hidden.dtype)
    if token_weight is None:
        share = 1.0 / max(n_tokens, 1) if reduction == "mean" else 1.0
        return hidden.new_full((n_tokens,), share, dtype=dtype)
    check_rows("token_weight", token_weight, hidden_name, hidden)
    if token_weight.is_complex():
        raise ValueError(f"token_weight: got {describe(token_weight)}, must be real numbers")
    # Kernels read adjacent weights; a column of a matrix would keep its stride through both calls.
    row_weight = token_weight.detach().reshape(-1).to(dtype).contiguous()
    if reduction == "mean":
        total = row_weight.sum()
        row_weight = row_weight / torch.where(total == 0, 1.0, total)
    return row_weight


def check_budget(memory_budget: int | None) -> None:
    """Check that it is a number of bytes, or None. The plan checks whether a row fits."""
    if memory_budget is None:
        return
    whole = isinstance(memory_budget, Integral | torch.SymInt)
    if not whole or isinstance(memory_budget, bool) or not memory_budget > 0:
        raise ValueError(
            f"memory_budget: got {memory_budget!r}, must be a positive whole number of bytes, "
            "or None"
        )


def cast_for_autocast(*tensors: Tensor | None) -> list[Any]:
    """Cast operands under autocast as a matrix product would; None stays None.

    On a GPU that is to autocast's dtype: the logits still accumulate in fp32, and the product is
    several times faster. On the CPU nothing is gained by rounding the operands, so the hidden
    states get the weight's dtype if it differs.
    """
    present = [x for x in tensors if x is not None]
    device = present[0].device.type
    if (
        device == "meta"
        or not torch.is_autocast_enabled(device)
        or any(x.dtype == torch.float64 for x in present)
    ):
        return list(tensors)
    if device == "cpu":
        dtype = torch.promote_types(present[0].dtype, present[-1].dtype)
        for x in present:
            dtype = torch.promote_types(dtype, x.dtype)
    else:
        dtype = torch.get_autocast_dtype(device)
    return [x if x is None else x.to(dtype) for x in tensors]
