"""The algorithm of the fused divergence: passes over the vocabulary for each block of tokens.

1. `normalisers` of both roles.
2. `sums`, if the gradient needs them first.
3. `gradient_`, whose tiles two products read at once: dh += G W and dW += G^T h.

In one pass (`plan.one_pass`) the tile has all logits of a block and stays for all three: 8 N V D
multiply-adds for a trainable head and 6 for a frozen one, as many as the dense form. With smaller
tiles every pass computes the products again, and the second is skipped where possible: forward_kl's
gradient S - T needs no sum, and with a frozen head the others' is computed as two sums, dh = A -
(sum p) B. That leaves 12 for a trainable head and forward_kl, 16 for the others, 10 and 12 for a
frozen one. Clip("token") scales a token's gradient by a factor that needs the sums: dh can be
scaled afterwards, dW cannot. Clip("entry") always needs the sums first.

If ranks have parts of the vocabulary, the per-token numbers are combined after passes 1 and 2, and
dh at the end.

Gradients are computed in forward, with each token's share of the loss, so that backward only scales
them by the incoming scalar.

A loss l_n of the log-probability of a token's target needs no other sweep: the normalisers give the
log-probability, and its derivative c_n adds c_n (1[v is the target] - S) to G.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from opsd_kernels import gemm
from opsd_kernels.divergence import Clip, LogitTransform, Rule
from opsd_kernels.resolve import load
from opsd_kernels.sharded import Shards
from opsd_kernels.sweep import Gradients, Head, Sweep, Want, blocks, buffers, plan_call
from opsd_kernels.tiles import state as states

# Rows of the per-token statistics that are returned.
LOSS, DIVERGENCE, STUDENT_ENTROPY, TEACHER_ENTROPY, CLIPPED, INVERTED = range(6)
STUDENT_LOG_PROB, TEACHER_LOG_PROB = 6, 7  # of the targets, if there are any
TOKEN_LOSS = 8  # l_n
STATISTICS = 9

TokenLoss = Callable[[Tensor, Tensor | slice], Tensor]
"""(log-probabilities of targets [n], the indices of their tokens among N) -> the l of each [n]."""


def divergence_blocks(
    student: Tensor,
    teacher: Tensor,
    heads: tuple[Head, Head],
    row_weight: Tensor,
    *,
    rule: Rule,
    want: Want,
    budget: int | None,
    backend: str,
    shards: Shards | None,
    targets: Tensor | None = None,
    token_loss: TokenLoss | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(stats [9, N], dh [N, D], dW [V, D], dbias [V]); the last three where `want`ed, for the loss
    sum_n row_weight_n loss_n + l_n.

    student [N, D], teacher [N, D_t]; `heads` of both; targets [N]: entries of the whole vocabulary,
    whose log-probabilities are then among the statistics. dh is rounded to the hidden states'
    dtype, dW and dbias to the weight's.
    """
    dtype, n_tokens = gemm.tile_dtype(student.dtype), student.shape[0]
    functions = load(backend)
    forward = rule.divergence.name == "forward_kl"
    entry_clip, token_clip = rule.entry_clip, rule.token_clip
    # Whether the gradient can be computed without the sums, if that saves a pass.
    direct = entry_clip is None and (not want.head or (forward and token_clip is None))
    # dh = A - (sum p) B is a small difference, which operands of 16 bits would round away.
    direct = direct and (forward or gemm.exact_operands(student))
    # The token clip applies only to the divergence, so its factor must be known before l_n is
    # added.
    apart = token_loss is not None and token_clip is not None
    direct = direct and not apart
    plan = plan_call(
        (student, teacher),
        heads,
        functions,
        two_sums=direct and not forward and want.hidden,
        vocabulary=heads[0].weight.shape[0] if shards is None else shards.largest,
        budget=budget,
        trains_head=want.weight,
    )
    at_once = plan.one_pass and shards is None and not apart and row_fits(functions, student, heads)
    direct = direct and want.any and not at_once and (forward or not plan.one_pass)
    two_sums = direct and not forward

    stats = student.new_zeros((STATISTICS, n_tokens), dtype=dtype)
    buffer, narrow = buffers(student, plan, roles=2)
    unit = gemm.gradient_unit(student, row_weight, rule.transform.slope)
    gradients = Gradients(student, heads[0], want, plan, narrow, unit)
    if unit is not None:
        row_weight = row_weight * unit
    for rows in blocks(n_tokens, plan):
        sweep = Sweep((student[rows], teacher[rows]), heads, plan.columns, buffer)
        state = states.new(sweep.rows, student, dtype)
        factor = row_weight[rows] if want.any else None
        gradients.start(rows, two_sums=two_sums)
        if not at_once or token_loss is not None:
            add_normalisers_(sweep, functions.normalisers, rule, state, shards)
        if not at_once and not direct:
            add_sums_(sweep, functions.sums, rule, state, shards)
            if token_clip is not None and want.any:
                factor = factor * token_factor(state, token_clip)
        by_product = None
        if token_loss is not None:
            z = target_logits(targets[rows], student[rows], heads[0], rule.transform, shards)
            stats[TOKEN_LOSS, rows], slope = token_losses(token_loss, z, state, rows)
            if factor is not None:
                state[states.TARGET_WEIGHT] = slope / factor
                by_product = slope * rule.transform.derivative(z)
        if at_once:
            for tile in sweep:
                functions.rows(*tile.roles, rule, state, factor, gradients.room(tile))
        if want.any or entry_clip is not None:
            for tile in sweep:
                if not at_once:
                    room = gradients.room(tile)
                    functions.gradient_(*tile.roles, rule, state, factor, not direct, room)
                if by_product is not None:
                    first = tile.columns.start + (0 if shards is None else shards.offset)
                    add_to_targets_(gradients.written(tile), targets[rows] - first, by_product)
                if want.any:
                    gradients.add(tile, sweep.student)
        if shards is not None:
            if direct:
                shards.sum_(state[states.SUMS])
            if entry_clip is not None:
                shards.sum_(state[states.DOT])
        gradients.finish(
            rows,
            shards,
            state[states.UNNORMALISED] + state[states.TARGET_WEIGHT] if two_sums else None,
            token_factor(state, token_clip) if direct and token_clip is not None else None,
        )
        stats[:STUDENT_LOG_PROB, rows] = statistics(state, rule)
        if targets is not None:
            hidden = student[rows], teacher[rows]
            found = target_log_probs(targets[rows], hidden, heads, rule, state, shards)
            stats[STUDENT_LOG_PROB : TEACHER_LOG_PROB + 1, rows] = found
    del buffer, narrow
    return stats, *gradients.results()


def row_fits(functions, student: Tensor, heads: tuple[Head, Head]) -> bool:
    """Whether the backend can compute whole rows at once."""
    return hasattr(functions, "rows") and functions.row_fits(student.device, len(heads[0].weight))


def add_normalisers_(
    sweep: Sweep, normalisers: Callable[..., None], rule: Rule, state: Tensor, shards: Shards | None
) -> None:
    """Run pass 1 over the sweep's tiles."""
    for tile in sweep:
        normalisers(*tile.roles, rule, state)
    if shards is not None:
        shards.combine_normalisers_(state[states.STUDENT], state[states.TEACHER])


def add_sums_(
    sweep: Sweep, sums: Callable[..., None], rule: Rule, state: Tensor, shards: Shards | None
) -> None:
    """Run pass 2 over the sweep's tiles."""
    for tile in sweep:
        sums(*tile.roles, rule, state)
    if shards is not None:
        shards.sum_(state[states.SUMS])


def target_logits(
    targets: Tensor,
    hidden: Tensor,
    head: Head,
    transform: LogitTransform,
    shards: Shards | None,
) -> Tensor:
    """The logit [n] of each token's target, computed separately: D multiply-adds a token."""
    size, wide = len(head.weight), gemm.tile_dtype(hidden.dtype)
    local = targets - (0 if shards is None else shards.offset)
    z = hidden.new_zeros(len(hidden), dtype=wide)
    if size:  # a rank may have no rows of the head
        entry = local.clamp(0, size - 1)
        z = (hidden.to(wide) * head.weight[entry].to(wide)).sum(-1)
        z = transform(z if head.bias is None else z + head.bias[entry])
        z.masked_fill_((local < 0) | (local >= size), 0.0)
    if shards is not None:
        shards.sum_(z)
    return z


def target_log_probs(
    targets: Tensor,
    hidden: tuple[Tensor, Tensor],
    heads: tuple[Head, Head],
    rule: Rule,
    state: Tensor,
    shards: Shards | None,
) -> Tensor:
    """The log-probabilities [2, n] of the targets by student and teacher."""
    transforms = rule.transform, rule.of_teacher
    logits = (
        target_logits(targets, h, head, transform, shards)
        for h, head, transform in zip(hidden, heads, transforms, strict=True)
    )
    normalisers = state[states.STUDENT], state[states.TEACHER]
    return torch.stack([log_probs(*pair) for pair in zip(logits, normalisers, strict=True)])


def log_probs(z: Tensor, normaliser: Tensor) -> Tensor:
    """The log-probabilities [n] of entries with logits z."""
    return (z - normaliser[states.MAX]) - states.log_sum(normaliser)


def token_losses(
    token_loss: TokenLoss, z: Tensor, state: Tensor, rows: slice
) -> tuple[Tensor, Tensor]:
    """(l [n], its derivative by the log-probability [n]) for targets with logits z. l_n depends
    only on token n.
    """
    log_prob = log_probs(z, state[states.STUDENT])
    with torch.enable_grad():
        leaf = log_prob.requires_grad_()
        losses = token_loss(leaf, rows)
        if losses.shape != leaf.shape:
            raise ValueError(
                f"token_loss: returned shape {list(losses.shape)} for log-probabilities of shape "
                f"{list(leaf.shape)}, must return a loss for each"
            )
        (slope,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach().to(z.dtype), slope


def add_to_targets_(gradient: Tensor, targets: Tensor, amounts: Tensor) -> None:
    """Add `amounts` [n] to the gradient [n, v] at the targets that are in this tile."""
    elsewhere = (targets < 0) | (targets >= gradient.shape[1])
    amounts = amounts.masked_fill(elsewhere, 0.0).to(gradient.dtype)
    entry = targets.clamp(0, gradient.shape[1] - 1)
    gradient.scatter_add_(1, entry[:, None], amounts[:, None])


def token_factor(state: Tensor, clip: Clip) -> Tensor:
    """The factors [n] by which Clip("token") scales the tokens."""
    d = state[states.DIVERGENCE]
    return torch.where(d > clip.threshold, clip.threshold / d, 1.0)


def statistics(state: Tensor, rule: Rule) -> Tensor:
    """The first six statistics [6, n] from a complete state."""
    d = state[states.DIVERGENCE]
    loss, clipped, inverted = d, torch.zeros_like(d), torch.zeros_like(d)
    if rule.entry_clip is not None:
        loss, clipped = state[states.CLIPPED], state[states.COUNT]
        inverted = ((state[states.DOT] < 0) & (clipped > 0)).to(d.dtype)
    elif (clip := rule.token_clip) is not None:
        loss, clipped = d * token_factor(state, clip), (d > clip.threshold).to(d.dtype)
    entropies = (states.entropy(state[role]) for role in (states.STUDENT, states.TEACHER))
    return torch.stack((loss, d, *entropies, clipped, inverted))
