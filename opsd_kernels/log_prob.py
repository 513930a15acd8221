"""Computes log-probabilities of given tokens from hidden states, for policy gradients and
importance ratios.

It sweeps the vocabulary like the divergence, with one role: the normaliser gives log-probability
and entropy, and a second pass (not needed if a tile holds whole rows) the gradient.

With reduction="none" each token's share of the loss is known only in backward. So if only dh is
needed, forward computes it row by row, and backward scales the rows. With a trainable head,
backward computes the blocks again: 8 N V D multiply-adds instead of 6.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opsd_kernels import arguments, gemm
from opsd_kernels.arguments import IGNORED
from opsd_kernels.divergence import LogitTransform
from opsd_kernels.operator import FusedOperator, wanted
from opsd_kernels.resolve import load, resolve
from opsd_kernels.sharded import Shards, place
from opsd_kernels.sweep import Gradients, Head, Sweep, Want, blocks, buffers, plan_call
from opsd_kernels.tiles import state as states


def log_prob_blocks(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    row_weight: Tensor,
    *,
    transform: LogitTransform,
    want: Want,
    budget: int | None,
    backend: str,
    shards: Shards | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(stats [2, N]: log-probability and entropy; dh [N, D], dW [V, D], dbias [V] if `want`ed) for
    sum_n row_weight_n log_prob_n. targets [N] count from this rank's first row of the head.
    """
    functions = load(backend)
    plan = plan_call(
        (hidden,),
        (head,),
        functions,
        two_sums=False,
        vocabulary=head.weight.shape[0] if shards is None else shards.largest,
        budget=budget,
        trains_head=want.weight,
    )
    dtype = gemm.tile_dtype(hidden.dtype)
    stats = hidden.new_empty((2, hidden.shape[0]), dtype=dtype)
    buffer, narrow = buffers(hidden, plan, roles=1)
    unit = gemm.gradient_unit(hidden, row_weight, transform.slope)
    gradients = Gradients(hidden, head, want, plan, narrow, unit)
    if unit is not None:
        row_weight = row_weight * unit
    for rows in blocks(hidden.shape[0], plan):
        sweep = Sweep((hidden[rows],), (head,), plan.columns, buffer)
        state = states.new_log_prob(sweep.rows, hidden, dtype)
        for tile in sweep:
            local = targets[rows] - tile.columns.start
            functions.log_prob_normalisers(*tile.roles, local, transform, state)
        if shards is not None:
            shards.combine_normalisers_(state[states.STUDENT])
            shards.sum_(state[states.TARGET])
        if want.any:
            gradients.start(rows)
            for tile in sweep:
                local, room = targets[rows] - tile.columns.start, gradients.room(tile)
                functions.log_prob_gradient_(
                    *tile.roles, local, transform, state, row_weight[rows], room
                )
                gradients.add(tile, sweep.student)
            gradients.finish(rows, shards)
        stats[0, rows] = (state[states.TARGET] - state[states.MAX]) - states.log_sum(state)
        stats[1, rows] = states.entropy(state[states.STUDENT])
    del buffer, narrow
    return stats, *gradients.results()


class Options(NamedTuple):
    """The operator's arguments beside tensors, in types that its schema allows."""

    drop_zeros: bool
    want_hidden: bool
    want_weight: bool
    want_bias: bool
    temperature: float
    logit_scale: float
    logit_softcap: float | None
    memory_budget: int | None
    backend: str
    group: str | None


def _run(
    tensors: Sequence[Any], row_weight: Tensor, options: Options, gradients: bool
) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, targets = tensors
    split, vocabulary = None, weight.shape[0]
    ignored = None if options.drop_zeros else targets == IGNORED
    if ignored is not None:  # NaN in their hidden states must not spread
        hidden = hidden.masked_fill(ignored[:, None], 0.0)
        targets = targets.masked_fill(ignored, 0)
    if options.group is not None:
        split = Shards.agree(options.group, weight.shape[0], hidden.shape[0], hidden.device)
        vocabulary = sum(split.sizes)
    # Without this, a target outside the vocabulary would get a plausible log-probability.
    outside = (targets < 0) | (targets >= vocabulary)
    row_weight = row_weight.masked_fill(outside, torch.nan)
    if split is not None:
        targets = targets - split.offset
    stats, *found = log_prob_blocks(
        hidden,
        Head(weight, None if bias is None else bias.to(row_weight.dtype).contiguous()),
        targets,
        row_weight,
        transform=LogitTransform(options.temperature, options.logit_scale, options.logit_softcap),
        want=wanted(options) if gradients else Want(False, False, False),
        budget=options.memory_budget,
        backend=options.backend,
        shards=split,
    )
    stats[0].masked_fill_(outside, torch.nan)
    if ignored is not None:
        stats.masked_fill_(ignored, 0.0)
    return row_weight * stats[0], stats, *found


_operator = FusedOperator(
    "linear_log_prob",
    _run,
    tensors=("hidden", "weight", "bias?", "targets"),
    by_token=("hidden", "targets"),
    trainable=("hidden", "weight", "bias"),
    options=Options,
    statistics=2,
)


@dataclass(frozen=True)
class LinearLogProb:
    """The result of `linear_log_prob`, in nats, fp32 (fp64 for fp64 inputs). All but log_prob are
    detached, and 0 at tokens of weight 0.

    log_prob: differentiable; with reduction="none" w_n log p_n for each token [...], otherwise a
        scalar.
    entropy, per_token [...]: the entropy, and log p_n without the weight.
    """

    log_prob: Tensor
    entropy: Tensor
    per_token: Tensor


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "none",
    memory_budget: int | None = None,
    backend: str = "auto",
    process_group: object = None,
) -> LinearLogProb:
    """log softmax(logits)[target] of each token, without the logits ever in memory at once.

    hidden [..., D], weight [V, D], targets [...] of integers in [0, V), bias [V]. Gradients reach
    hidden, weight and bias. Dtypes, logits, memory_budget, backend, process_group and errors are as
    in `linear_divergence`; where the vocabulary is split, targets are entries of all of it.

    token_weight [...]: a constant weight w_n for each token; those of weight 0 cost nothing, and
    their targets may be anything. Without it tokens of target -100 have weight 0, as in Hugging
    Face's labels. Other targets outside [0, V) raise a ValueError where their values can be read
    without waiting, and otherwise (GPU, torch.compile, process groups) give NaN.
    reduction: mean = sum w log p / sum w, sum = sum w log p, none = w log p for each token. What is
    known of the weights here saves a trainable head a quarter of the products: cross-entropy is
    -linear_log_prob(..., reduction="mean").log_prob.

    >>> import torch
    >>> result = linear_log_prob(torch.zeros(2, 4), torch.eye(5, 4), torch.tensor([0, 3]))
    >>> result.log_prob, result.entropy
    (tensor([-1.6094, -1.6094]), tensor([1.6094, 1.6094]))
    """
    transform = LogitTransform(temperature, logit_scale, logit_softcap)
    arguments.check_reduction(reduction)
    arguments.check_budget(memory_budget)
    arguments.check_tensors(
        {"hidden": hidden, "weight": weight, "targets": targets},
        bias=bias,
        token_weight=token_weight,
    )
    placed, (weight, bias) = place(process_group, weight, bias=bias)
    hidden, weight, bias = arguments.cast_for_autocast(hidden, weight, bias)
    sharded = placed.group is not None
    arguments.check_hidden("hidden", hidden)
    arguments.check_head("hidden", hidden, "weight", weight, "bias", bias, sharded)
    arguments.check_rows("targets", targets, "hidden", hidden)
    counts = (targets != IGNORED).float() if token_weight is None else token_weight
    row_weight = arguments.row_weights(counts, reduction, "hidden", hidden)
    arguments.check_targets(targets, token_weight, None if sharded else weight.shape[0])
    leading = hidden.shape[:-1]
    n_tokens = leading.numel()
    placed = placed.with_tokens(n_tokens, hidden.device)
    log_prob, stats = _operator(
        (
            placed.gather(hidden.reshape(n_tokens, hidden.shape[-1])),
            weight,
            bias,
            placed.gather(targets.reshape(-1).long()),
        ),
        placed.gather(row_weight),
        reduction == "none" or placed.own_tokens,
        Options(
            # Dropping tokens waits for a GPU, which is worth it only if there are weights. Without
            # them, tokens of target -100 are masked on a GPU.
            drop_zeros=token_weight is not None or hidden.device.type == "cpu",
            want_hidden=arguments.wants_gradient(hidden),
            want_weight=arguments.wants_gradient(weight),
            want_bias=arguments.wants_gradient(bias),
            temperature=float(transform.temperature),
            logit_scale=float(transform.scale),
            logit_softcap=None if transform.softcap is None else float(transform.softcap),
            memory_budget=memory_budget,
            backend=resolve(backend, hidden.device, hidden.dtype),
            group=placed.name,
        ),
    )
    if placed.own_tokens:
        log_prob, stats = placed.own(log_prob), stats[:, placed.rows]
        log_prob = log_prob if reduction == "none" else log_prob.sum()
    return LinearLogProb(
        log_prob=log_prob.reshape(leading) if reduction == "none" else log_prob,
        entropy=stats[1].reshape(leading),
        per_token=stats[0].reshape(leading),
    )
