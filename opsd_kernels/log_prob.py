"""Log-probability of given tokens, straight from hidden states: what policy gradients and
importance ratios need.

The same loop over blocks of tokens as `linear.py`. How much each token's log-probability matters is
known in backward only: so forward computes dh row by row where it alone is wanted (backward scales
the rows), and with a trainable head backward computes the blocks again.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from opsd_kernels import arguments, gemm
from opsd_kernels.backward import refuse_double_backward, scaled
from opsd_kernels.divergence import LogitTransform
from opsd_kernels.plan import plan_rows
from opsd_kernels.resolve import load, resolve
from opsd_kernels.tiles import state as states


def log_prob_blocks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_weight: Tensor,
    *,
    transform: LogitTransform,
    want: tuple[bool, bool, bool],
    budget: int | None,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(stats [2, N]: log-probability and entropy, dh, dW, dbias), as `linear.divergence_blocks`."""
    dtype = gemm.tile_dtype(hidden.dtype)
    n_tokens, vocabulary = hidden.shape[0], weight.shape[0]
    tile_functions = load(backend)
    plan = plan_rows(
        n_tokens,
        vocabulary,
        tiles=tile_functions.TILES - 1,
        item_bytes=dtype.itemsize,
        row_bytes=2 * hidden.shape[1] * dtype.itemsize,
        fixed_bytes=gemm.slice_bytes(weight),
        budget=budget,
    )
    want_hidden, want_weight, want_bias = want
    stats = hidden.new_zeros((2, n_tokens), dtype=dtype)
    d_hidden = torch.zeros_like(hidden) if want_hidden else None
    d_weight = torch.zeros_like(weight, dtype=dtype) if want_weight else None
    d_bias = weight.new_zeros(vocabulary, dtype=dtype) if want_bias else None
    bias = None if bias is None else bias.to(dtype)
    tile = hidden.new_empty((plan.rows, vocabulary), dtype=dtype)
    for start in range(0, n_tokens, max(plan.rows, 1)):
        rows = slice(start, min(start + plan.rows, n_tokens))
        block = tile[: rows.stop - start]
        gemm.logits_(block, hidden[rows], weight)
        state = states.new_log_prob(rows.stop - start, block, dtype)
        if hasattr(tile_functions, "log_prob_rows"):
            factor = row_weight[rows] if any(want) else None
            tile_functions.log_prob_rows(block, bias, targets[rows], transform, state, factor)
        else:
            tile_functions.log_prob_normalisers(block, bias, targets[rows], transform, state)
            if any(want):
                tile_functions.log_prob_gradient_(
                    block, bias, targets[rows], transform, state, row_weight[rows]
                )
        stats[0, rows] = (state[states.TARGET] - state[states.MAX]) - state[states.SUM].log()
        stats[1, rows] = states.entropy(state[states.STUDENT])
        if want_hidden:
            wide = torch.empty_like(hidden[rows], dtype=dtype)
            gemm.input_gradient_(wide, block, weight)
            d_hidden[rows] = wide
        if want_weight:
            gemm.add_weight_gradient_(d_weight, block, hidden[rows])
        if want_bias:
            d_bias += block.sum(0)
    del tile
    if want_weight:
        d_weight = d_weight.to(weight.dtype)
    if want_bias:
        d_bias = d_bias.to(weight.dtype)
    return stats, d_hidden, d_weight, d_bias


class Options(NamedTuple):
    want_hidden: bool
    want_weight: bool
    want_bias: bool
    temperature: float
    logit_scale: float
    logit_softcap: float | None
    memory_budget: int | None
    backend: str

    @property
    def wanted(self) -> tuple[bool, bool, bool]:
        return self.want_hidden, self.want_weight, self.want_bias

    @property
    def in_forward(self) -> tuple[bool, bool, bool]:
        """The gradients that forward computes, row by row."""
        return self.want_hidden and not (self.want_weight or self.want_bias), False, False


def _run(hidden, weight, targets, bias, row_weight, options, want):
    with torch.amp.autocast(hidden.device.type, enabled=False):
        stats, *gradients = log_prob_blocks(
            hidden,
            weight,
            targets,
            bias,
            row_weight,
            transform=LogitTransform(
                options.temperature, options.logit_scale, options.logit_softcap
            ),
            want=want,
            budget=options.memory_budget,
            backend=options.backend,
        )
    return stats, *(weight.new_empty(0) if g is None else g for g in gradients)


@torch.library.custom_op("opsd::linear_log_prob", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    temperature: float,
    logit_scale: float,
    logit_softcap: float | None,
    memory_budget: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log_prob [N], entropy [N], the derivative of each row's log_prob by its hidden state, or an
    empty tensor).
    """
    options = Options(
        want_hidden,
        want_weight,
        want_bias,
        temperature,
        logit_scale,
        logit_softcap,
        memory_budget,
        backend,
    )
    ones = hidden.new_ones(hidden.shape[0], dtype=gemm.tile_dtype(hidden.dtype))
    stats, d_hidden, _, _ = _run(hidden, weight, targets, bias, ones, options, options.in_forward)
    return stats[0].clone(), stats[1].clone(), d_hidden


@torch.library.custom_op("opsd::linear_log_prob_backward", mutates_args=())
def _recompute(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_weight: Tensor,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    temperature: float,
    logit_scale: float,
    logit_softcap: float | None,
    memory_budget: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, dW, dbias) of sum_n row_weight_n log_prob_n."""
    options = Options(
        want_hidden,
        want_weight,
        want_bias,
        temperature,
        logit_scale,
        logit_softcap,
        memory_budget,
        backend,
    )
    _, *gradients = _run(hidden, weight, targets, bias, row_weight, options, options.wanted)
    return tuple(gradients)


@_forward.register_fake
def _(hidden, weight, targets, bias, *options):
    rows = hidden.new_empty(hidden.shape[:1], dtype=gemm.tile_dtype(hidden.dtype))
    now = Options(*options).in_forward[0]
    return rows, torch.empty_like(rows), hidden.new_empty(hidden.shape if now else (0,))


@_recompute.register_fake
def _(hidden, weight, targets, bias, row_weight, *options):
    want_hidden, want_weight, want_bias = Options(*options).wanted
    return (
        hidden.new_empty(hidden.shape if want_hidden else (0,)),
        weight.new_empty(weight.shape if want_weight else (0,)),
        weight.new_empty(weight.shape[:1] if want_bias else (0,)),
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.options = Options(*inputs[4:])
    ctx.arguments = len(inputs)
    computed = ctx.options.in_forward[0]
    ctx.save_for_backward(*(output[2:] if computed else inputs[:4]))


def _backward(ctx, grad, *_):
    returned = [None] * ctx.arguments
    if grad is None:
        return tuple(returned)
    refuse_double_backward(grad)
    if ctx.options.in_forward[0]:
        (returned[0],) = scaled(ctx.saved_tensors, grad[:, None])
        return tuple(returned)
    gradients = _recompute(*ctx.saved_tensors, grad, *ctx.options)
    for place, gradient, wanted in zip((0, 1, 3), gradients, ctx.options.wanted, strict=True):
        if wanted:
            returned[place] = gradient
    return tuple(returned)


_forward.register_autograd(_backward, setup_context=_setup_context)


@dataclass(frozen=True)
class LinearLogProb:
    """log_prob [...]: differentiable; entropy [...]: detached. Both in nats, fp32 (fp64 for fp64
    inputs).
    """

    log_prob: Tensor
    entropy: Tensor


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
    process_group: object = None,
) -> LinearLogProb:
    """log softmax(logits)[target] of each token, without the logits ever in memory at once.

    hidden [..., D], weight [V, D], targets [...] of integers in [0, V), bias [V]. Gradients reach
    hidden, weight and bias. Dtypes, logits, memory_budget, backend, process_group and errors are as
    in `linear_divergence`.
    """
    arguments.refuse_process_group(process_group)
    transform = LogitTransform(temperature, logit_scale, logit_softcap)
    arguments.check_budget(memory_budget)
    hidden, weight, bias = arguments.cast_for_autocast(hidden, weight, bias)
    arguments.check_hidden("hidden", hidden)
    arguments.check_head("hidden", hidden, "weight", weight, "bias", bias)
    arguments.check_rows("targets", targets, "hidden", hidden)
    arguments.check_targets(targets, weight.shape[0])
    leading = hidden.shape[:-1]
    log_prob, entropy, _ = _forward(
        hidden.reshape(leading.numel(), hidden.shape[-1]),
        weight,
        targets.reshape(-1).long(),
        bias,
        arguments.wants_gradient(hidden),
        arguments.wants_gradient(weight),
        arguments.wants_gradient(bias),
        float(transform.temperature),
        float(transform.scale),
        None if transform.softcap is None else float(transform.softcap),
        memory_budget,
        resolve(backend, hidden.device, hidden.dtype),
    )
    return LinearLogProb(log_prob.reshape(leading), entropy.detach().reshape(leading))
