"""Divergence between two roles' next-token distributions, straight from hidden states: no [N, V]
tensor ever exists.

From top to bottom: the loop over blocks of tokens, its registration as a torch operator with a
derivative, and the public function.

One pass over rows. For a block of n tokens all V logits of both roles are computed (one stacked
product where the head is shared), a backend reduces them to per-token numbers and overwrites the
student's tile with the gradient of the loss, and the two products dh = G W and dW += G^T h consume
that tile at once. So forward already holds the gradients, and backward only scales them by the
incoming scalar: 8 N V D multiply-adds for a trainable head and 6 for a frozen one, as many as the
dense form. That needs each token's share of the loss before backward, which is why `token_weight`
and `reduction` are arguments. With reduction="none" the share is known in backward only: there dh
is scaled row by row where it alone is needed, and otherwise the block is computed again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from opsd_kernels import arguments, gemm
from opsd_kernels.backward import refuse_double_backward, scaled
from opsd_kernels.divergence import Clip, Divergence, LogitTransform
from opsd_kernels.plan import plan_rows
from opsd_kernels.resolve import load, resolve
from opsd_kernels.tiles import state as states

# Rows of the per-token numbers, see tiles/torch.py.
LOSS, DIVERGENCE, STUDENT_ENTROPY, TEACHER_ENTROPY, CLIPPED, OPPOSED = range(6)


def divergence_blocks(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    teacher_weight: Tensor | None,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    row_weight: Tensor,
    *,
    divergence: Divergence,
    transform: LogitTransform,
    clip: Clip | None,
    want: tuple[bool, bool, bool],
    budget: int | None,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(stats [6, N], dh [N, D], dW [V, D], dbias [V]); the last three where `want`ed, for the loss
    sum_n row_weight_n loss_n.

    dh is rounded to the hidden states' dtype, dW and dbias to the weight's.
    """
    dtype = gemm.tile_dtype(student.dtype)
    n_tokens, vocabulary = student.shape[0], weight.shape[0]
    tile_functions = load(backend)
    shared = teacher_weight is None
    plan = plan_rows(
        n_tokens,
        vocabulary,
        tiles=tile_functions.TILES,
        item_bytes=dtype.itemsize,
        row_bytes=2 * (student.shape[1] * (student.element_size() + dtype.itemsize)),
        fixed_bytes=max(gemm.slice_bytes(w) for w in (weight, teacher_weight) if w is not None),
        budget=budget,
    )
    want_hidden, want_weight, want_bias = want
    stats = student.new_zeros((6, n_tokens), dtype=dtype)
    d_hidden = torch.zeros_like(student) if want_hidden else None
    d_weight = torch.zeros_like(weight, dtype=dtype) if want_weight else None
    d_bias = weight.new_zeros(vocabulary, dtype=dtype) if want_bias else None
    bias = None if bias is None else bias.to(dtype)
    teacher_bias = None if teacher_bias is None else teacher_bias.to(dtype)
    tile = student.new_empty((2 * plan.rows, vocabulary), dtype=dtype)

    for start in range(0, n_tokens, max(plan.rows, 1)):
        rows = slice(start, min(start + plan.rows, n_tokens))
        n = rows.stop - start
        h = student[rows]
        tile_s, tile_t = tile[:n], tile[n : 2 * n]
        if shared:
            gemm.logits_(tile[: 2 * n], torch.cat((h, teacher[rows])), weight)
        else:
            gemm.logits_(tile_s, h, weight)
            gemm.logits_(tile_t, teacher[rows], teacher_weight)
        state = states.new(n, tile, dtype)
        factor = row_weight[rows] if any(want) else None
        whole_rows(
            tile_functions,
            tile_s,
            tile_t,
            bias,
            teacher_bias,
            divergence,
            transform,
            clip,
            state,
            factor,
        )
        stats[:, rows] = statistics(state, clip)
        if want_hidden:
            if d_hidden.dtype == dtype:
                gemm.input_gradient_(d_hidden[rows], tile_s, weight)
            else:
                wide = torch.empty_like(h, dtype=dtype)
                gemm.input_gradient_(wide, tile_s, weight)
                d_hidden[rows] = wide
        if want_weight:
            gemm.add_weight_gradient_(d_weight, tile_s, h)
        if want_bias:
            d_bias += tile_s.sum(0)
    del tile
    if want_weight:
        d_weight = d_weight.to(weight.dtype)
    if want_bias:
        d_bias = d_bias.to(weight.dtype)
    return stats, d_hidden, d_weight, d_bias


def whole_rows(
    backend, student, teacher, bias, teacher_bias, divergence, transform, clip, state, row_weight
) -> None:
    """All that tiles which hold whole rows need."""
    tensors = (student, teacher, bias, teacher_bias)
    if hasattr(backend, "rows"):
        backend.rows(*tensors, divergence, transform, clip, state, row_weight)
        return
    backend.normalisers(*tensors, transform, state)
    backend.sums(*tensors, divergence, transform, clip, state)
    if row_weight is not None and clip is not None and clip.kind == "token":
        row_weight = row_weight * token_factor(state, clip)
    if row_weight is not None or (clip is not None and clip.kind == "entry"):
        backend.gradient_(*tensors, divergence, transform, clip, state, row_weight)


def token_factor(state: Tensor, clip: Clip) -> Tensor:
    d = state[states.DIVERGENCE]
    return torch.where(d > clip.threshold, clip.threshold / d, 1.0)


def statistics(state: Tensor, clip: Clip | None) -> Tensor:
    """[6, n] of a complete state: see the names at the top of the file."""
    d = state[states.DIVERGENCE]
    loss, clipped, opposed = d, torch.zeros_like(d), torch.zeros_like(d)
    if clip is not None and clip.kind == "entry":
        loss, clipped = state[states.CLIPPED], state[states.COUNT]
        opposed = ((state[states.DOT] < 0) & (clipped > 0)).to(d.dtype)
    elif clip is not None:
        loss, clipped = d * token_factor(state, clip), (d > clip.threshold).to(d.dtype)
    entropies = (states.entropy(state[role]) for role in (states.STUDENT, states.TEACHER))
    return torch.stack((loss, d, *entropies, clipped, opposed))


# --- The operator ---
# An operator's schema has tensors and scalars only: the small descriptions travel as their fields,
# `Options` in the order of both schemas. What is not wanted comes back as an empty tensor.


class Options(NamedTuple):
    drop_zeros: bool
    want_hidden: bool
    want_weight: bool
    want_bias: bool
    divergence: str
    beta: float
    temperature: float
    logit_scale: float
    logit_softcap: float | None
    clip: str | None
    clip_threshold: float
    memory_budget: int | None
    backend: str

    @property
    def wanted(self) -> tuple[bool, bool, bool]:
        return self.want_hidden, self.want_weight, self.want_bias


def _gradients_in_forward(per_token: bool, options: Options) -> bool:
    """Whether forward computes the gradients: not where a row's share of the loss is unknown and
    rows add up.
    """
    return any(options.wanted) and not (per_token and (options.want_weight or options.want_bias))


def _run(tensors: Sequence[Tensor | None], row_weight: Tensor, options: Options, gradients: bool):
    """(per-token loss, stats, dh, dW, dbias) of `divergence_blocks`, with tokens of weight 0 left
    out.
    """
    student, teacher, weight, teacher_weight, bias, teacher_bias = tensors
    n_tokens, keep = student.shape[0], None
    if options.drop_zeros:
        # The one synchronisation of a call. Dropped, not multiplied by zero: NaN * 0 is NaN, and
        # the products would be wasted.
        keep = row_weight.nonzero().squeeze(-1)
        student, teacher, row_weight = student[keep], teacher[keep], row_weight[keep]
    with torch.amp.autocast(student.device.type, enabled=False):
        stats, d_hidden, d_weight, d_bias = divergence_blocks(
            student,
            teacher,
            weight,
            teacher_weight,
            bias,
            teacher_bias,
            row_weight,
            divergence=Divergence(options.divergence, options.beta),
            transform=LogitTransform(
                options.temperature, options.logit_scale, options.logit_softcap
            ),
            clip=None if options.clip is None else Clip(options.clip, options.clip_threshold),
            want=options.wanted if gradients else (False, False, False),
            budget=options.memory_budget,
            backend=options.backend,
        )
    loss = row_weight * stats[LOSS]
    if keep is not None:
        loss = loss.new_zeros(n_tokens).index_copy_(0, keep, loss)
        stats = stats.new_zeros((stats.shape[0], n_tokens)).index_copy_(1, keep, stats)
        if d_hidden is not None:
            d_hidden = d_hidden.new_zeros((n_tokens, d_hidden.shape[1])).index_copy_(
                0, keep, d_hidden
            )
    gradients = [weight.new_empty(0) if g is None else g for g in (d_hidden, d_weight, d_bias)]
    return loss, stats, *gradients


@torch.library.custom_op("opsd::linear_divergence", mutates_args=())
def _forward(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    teacher_weight: Tensor | None,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    row_weight: Tensor,
    per_token: bool,
    drop_zeros: bool,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    divergence: str,
    beta: float,
    temperature: float,
    logit_scale: float,
    logit_softcap: float | None,
    clip: str | None,
    clip_threshold: float,
    memory_budget: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [] or [N], stats [6, N], dh, dW, dbias)."""
    options = Options(
        drop_zeros,
        want_hidden,
        want_weight,
        want_bias,
        divergence,
        beta,
        temperature,
        logit_scale,
        logit_softcap,
        clip,
        clip_threshold,
        memory_budget,
        backend,
    )
    tensors = (student, teacher, weight, teacher_weight, bias, teacher_bias)
    now = _gradients_in_forward(per_token, options)
    loss, stats, *gradients = _run(tensors, row_weight, options, now)
    return loss if per_token else loss.sum(), stats, *gradients


@torch.library.custom_op("opsd::linear_divergence_backward", mutates_args=())
def _recompute(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    teacher_weight: Tensor | None,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    row_weight: Tensor,
    drop_zeros: bool,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    divergence: str,
    beta: float,
    temperature: float,
    logit_scale: float,
    logit_softcap: float | None,
    clip: str | None,
    clip_threshold: float,
    memory_budget: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, dW, dbias) of sum_n row_weight_n loss_n, where that weight was unknown in forward."""
    options = Options(
        drop_zeros,
        want_hidden,
        want_weight,
        want_bias,
        divergence,
        beta,
        temperature,
        logit_scale,
        logit_softcap,
        clip,
        clip_threshold,
        memory_budget,
        backend,
    )
    tensors = (student, teacher, weight, teacher_weight, bias, teacher_bias)
    _, _, *gradients = _run(tensors, row_weight, options, True)
    return tuple(gradients)


def _empty_gradients(student: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]):
    return (
        student.new_empty(student.shape if wanted[0] else (0,)),
        weight.new_empty(weight.shape if wanted[1] else (0,)),
        weight.new_empty(weight.shape[:1] if wanted[2] else (0,)),
    )


@_forward.register_fake
def _(*arguments):
    student, _, weight, *_ = arguments
    per_token, options = arguments[_TENSORS], Options(*arguments[_TENSORS + 1 :])
    dtype, n_tokens = gemm.tile_dtype(student.dtype), student.shape[0]
    now = _gradients_in_forward(per_token, options)
    return (
        student.new_empty((n_tokens,) if per_token else (), dtype=dtype),
        student.new_empty((6, n_tokens), dtype=dtype),
        *_empty_gradients(student, weight, options.wanted if now else (False, False, False)),
    )


@_recompute.register_fake
def _(*arguments):
    student, _, weight, *_ = arguments
    return _empty_gradients(student, weight, Options(*arguments[_TENSORS:]).wanted)


_TENSORS = 7


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.arguments = len(inputs)
    ctx.per_token, ctx.options = inputs[_TENSORS], Options(*inputs[_TENSORS + 1 :])
    ctx.computed = _gradients_in_forward(ctx.per_token, ctx.options)
    ctx.save_for_backward(*(output[2:] if ctx.computed else inputs[:_TENSORS]))


def _backward(ctx, grad, *_):
    returned = [None] * ctx.arguments
    if grad is None:
        return tuple(returned)
    refuse_double_backward(grad)
    if ctx.computed:
        d_hidden, d_weight, d_bias = scaled(
            ctx.saved_tensors, grad[:, None] if ctx.per_token else grad
        )
    else:
        *tensors, row_weight = ctx.saved_tensors
        d_hidden, d_weight, d_bias = _recompute(*tensors, row_weight * grad, *ctx.options)
    for place, gradient, wanted in zip(
        (0, 2, 4), (d_hidden, d_weight, d_bias), ctx.options.wanted, strict=True
    ):
        if wanted:
            returned[place] = gradient
    return tuple(returned)


_forward.register_autograd(_backward, setup_context=_setup_context)


# --- The public function ---


@dataclass(frozen=True)
class LinearDivergence:
    """What `linear_divergence` returns. Per-token tensors have the hidden states' leading shape and
    are fp32 (fp64 for fp64 inputs); all but the loss are detached, and 0 at tokens of weight 0.

    loss: a scalar, or under reduction="none" w_n d_n for each token.
    per_token: the divergence in nats, neither weighted nor clipped.
    student_entropy, teacher_entropy: in nats.
    clipped_fraction: a scalar, how much of what the clip looks at it clipped: the share of tokens
        for Clip("token", ...), of vocabulary entries for Clip("entry", ...), 0 without a clip.
        Tokens of weight 0 do not count, here and below.
    opposed_fraction: a scalar, the share of tokens whose clipped gradient points away from the
        unclipped one.
    """

    loss: Tensor
    per_token: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    clipped_fraction: Tensor
    opposed_fraction: Tensor


def linear_divergence(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    token_weight: Tensor | None = None,
    clip: Clip | None = None,
    reduction: str = "mean",
    memory_budget: int | None = None,
    backend: str = "auto",
    gradient: str = "exact",
    process_group: object = None,
) -> LinearDivergence:
    """Divergence of the teacher's from the student's distribution, without the logits ever in
    memory at once.

    student_hidden [..., D], teacher_hidden [..., D_t] of the same leading shape; weight [V, D],
    bias [V]; teacher_weight [V, D_t], teacher_bias [V]. Without `teacher_weight`, `weight` serves
    both roles, and so does `bias` unless `teacher_bias` is given. All in one dtype (fp32, bf16,
    fp16; fp64 by the torch backend) on one device. Logits are accumulated and kept in fp32.

    divergence: forward_kl | reverse_kl | jsd (with `beta`), see `opsd_kernels.Divergence`. Logits
    are softcap(logit_scale * (h W^T + bias)) / temperature. token_weight [...]: a constant weight
    w_n for each token; those of weight 0 cost nothing, and what their hidden states hold (NaN) does
    not leak. clip: see `opsd_kernels.Clip`. reduction: mean = sum w d / sum w, sum = sum w d, none
    = w d for each token. All weights 0, or no tokens: loss 0 and zero gradients.

    Gradients reach student_hidden, weight and bias (in the student's role only), never the
    teacher's side.

    memory_budget: bytes of scratch memory (default 256 MiB), beside the gradients. backend: auto |
    torch | cpp, see `opsd_kernels.backends()`. gradient: "exact" and process_group: None are the
    only ones in this release.

    Raises ValueError for what does not fit, NotImplementedError for what this release does not
    have; both name the argument.
    """
    arguments.refuse_process_group(process_group)
    if gradient == "filtered":
        raise NotImplementedError(
            "gradient: got 'filtered', which is not in this release: must be 'exact'"
        )
    if gradient != "exact":
        raise ValueError(f"gradient: got {gradient!r}, must be 'exact'")
    described = Divergence(divergence, beta)
    LogitTransform(temperature, logit_scale, logit_softcap)  # checks its fields
    if clip is not None and not isinstance(clip, Clip):
        raise ValueError(f"clip: got {clip!r}, must be None or an opsd_kernels.Clip")
    arguments.check_reduction(reduction)
    arguments.check_budget(memory_budget)

    if teacher_weight is None and teacher_bias is None:
        teacher_bias = bias
    student_hidden, teacher_hidden, weight, teacher_weight, bias, teacher_bias = (
        arguments.cast_for_autocast(
            student_hidden, teacher_hidden, weight, teacher_weight, bias, teacher_bias
        )
    )
    arguments.check_hidden("student_hidden", student_hidden)
    arguments.check_hidden("teacher_hidden", teacher_hidden)
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden: got {arguments.describe(teacher_hidden)}, must have the "
            f"leading shape {list(student_hidden.shape[:-1])} of student_hidden"
        )
    arguments.check_alike("teacher_hidden", teacher_hidden, "student_hidden", student_hidden)
    arguments.check_head("student_hidden", student_hidden, "weight", weight, "bias", bias)
    teacher_head = weight if teacher_weight is None else teacher_weight
    name = "weight" if teacher_weight is None else "teacher_weight"
    arguments.check_head(
        "teacher_hidden", teacher_hidden, name, teacher_head, "teacher_bias", teacher_bias
    )
    if teacher_head.shape[0] != weight.shape[0]:
        raise ValueError(
            f"teacher_weight: got {arguments.describe(teacher_head)}, must be "
            f"[{weight.shape[0]}, D_t]: one vocabulary"
        )

    leading = student_hidden.shape[:-1]
    n_tokens = leading.numel()
    dtype = gemm.tile_dtype(student_hidden.dtype)
    if token_weight is None:
        share = 1.0 / max(n_tokens, 1) if reduction == "mean" else 1.0
        row_weight = student_hidden.new_full((n_tokens,), share, dtype=dtype)
    else:
        arguments.check_rows("token_weight", token_weight, "student_hidden", student_hidden)
        row_weight = token_weight.detach().reshape(-1).to(dtype)
        if reduction == "mean":
            total = row_weight.sum()
            row_weight = row_weight / torch.where(total == 0, 1.0, total)

    loss, stats, *_ = _forward(
        student_hidden.reshape(n_tokens, student_hidden.shape[-1]),
        teacher_hidden.detach().reshape(n_tokens, teacher_hidden.shape[-1]),
        weight,
        None if teacher_weight is None else teacher_weight.detach(),
        bias,
        None if teacher_bias is None else teacher_bias.detach(),
        row_weight,
        reduction == "none",
        token_weight is not None,
        arguments.wants_gradient(student_hidden),
        arguments.wants_gradient(weight),
        arguments.wants_gradient(bias),
        described.name,
        float(described.beta),
        float(temperature),
        float(logit_scale),
        None if logit_softcap is None else float(logit_softcap),
        None if clip is None else clip.kind,
        1.0 if clip is None else float(clip.threshold),
        memory_budget,
        resolve(backend, student_hidden.device, student_hidden.dtype),
    )
    stats = stats.detach()
    counted = (row_weight != 0).sum().clamp(min=1)
    looked_at = counted * weight.shape[0] if clip is not None and clip.kind == "entry" else counted
    return LinearDivergence(
        loss=loss.reshape(leading) if reduction == "none" else loss,
        per_token=stats[DIVERGENCE].reshape(leading),
        student_entropy=stats[STUDENT_ENTROPY].reshape(leading),
        teacher_entropy=stats[TEACHER_ENTROPY].reshape(leading),
        clipped_fraction=stats[CLIPPED].sum() / looked_at,
        opposed_fraction=stats[OPPOSED].sum() / counted,
    )
