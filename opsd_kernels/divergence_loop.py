"""The algorithm of the fused divergence: passes over the vocabulary for each block of tokens.

1. `normalisers` of both roles.
2. `sums`, where the gradient needs them first.
3. `gradient_`, whose tiles two products consume at once: dh += G W and dW += G^T h.

In one pass (`plan.one_pass`) the tile holds all logits of a block and is there for all three:
8 N V D multiply-adds for a trainable head and 6 for a frozen one, as many as the dense form. With
smaller tiles every pass computes the products again, and the second is left out where it can be:
forward_kl's gradient S - T needs no sum, and with a frozen head that of the others comes as two
sums, dh = A - (sum p) B. What remains: 12 for a trainable head and forward_kl, 16 for the others,
10 and 12 for a frozen one. Clip("token") scales a token's gradient by what only the sums tell: dh
afterwards, but dW not. Clip("entry") always needs the sums first.

Over ranks that each hold a piece of the vocabulary, the per-token numbers are combined after passes
1 and 2, and dh at the end.

Gradients are computed in forward, with each token's share of the loss: so that backward only scales
them by the incoming scalar.
"""

import torch
from torch import Tensor

from opsd_kernels import gemm
from opsd_kernels.divergence import Clip, LogitTransform, Rule
from opsd_kernels.resolve import load
from opsd_kernels.sharded import Shards
from opsd_kernels.sweep import Gradients, Head, Sweep, Want, blocks, buffers, plan_call
from opsd_kernels.tiles import state as states

# Rows of the per-token numbers that come out.
LOSS, DIVERGENCE, STUDENT_ENTROPY, TEACHER_ENTROPY, CLIPPED, INVERTED = range(6)
STUDENT_LOG_PROB, TEACHER_LOG_PROB = 6, 7  # of the targets, where there are any
STATISTICS = 8


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
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(stats [8, N], dh [N, D], dW [V, D], dbias [V]); the last three where `want`ed, for the loss
    sum_n row_weight_n loss_n.

    student [N, D], teacher [N, D_t]; `heads` of both; targets [N]: entries of the whole vocabulary,
    whose log-probabilities are then the last two statistics. dh is rounded to the hidden states'
    dtype, dW and dbias to the weight's.
    """
    dtype, n_tokens = gemm.tile_dtype(student.dtype), student.shape[0]
    functions = load(backend)
    forward = rule.divergence.name == "forward_kl"
    entry_clip, token_clip = rule.entry_clip, rule.token_clip
    # Whether the gradient can be had without its sums, if that saves a pass.
    direct = entry_clip is None and (not want.head or (forward and token_clip is None))
    # dh = A - (sum p) B is a small difference: operands of 16 bits would round it away.
    direct = direct and (forward or gemm.exact_operands(student))
    plan = plan_call(
        (student, teacher),
        heads,
        functions,
        two_sums=direct and not forward and want.hidden,
        vocabulary=heads[0].weight.shape[0] if shards is None else shards.largest,
        budget=budget,
        trains_head=want.weight,
    )
    at_once = plan.one_pass and shards is None and hasattr(functions, "rows")
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
        if at_once:
            for tile in sweep:
                functions.rows(*tile.roles, rule, state, factor, gradients.room(tile))
        else:
            for tile in sweep:
                functions.normalisers(*tile.roles, rule, state)
            if shards is not None:
                shards.combine_normalisers_(state[states.STUDENT], state[states.TEACHER])
            if not direct:
                for tile in sweep:
                    functions.sums(*tile.roles, rule, state)
                if shards is not None:
                    shards.sum_(state[states.SUMS])
                if token_clip is not None and want.any:
                    factor = factor * token_factor(state, token_clip)
        if want.any or entry_clip is not None:
            for tile in sweep:
                if not at_once:
                    room = gradients.room(tile)
                    functions.gradient_(*tile.roles, rule, state, factor, not direct, room)
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
            state[states.UNNORMALISED] if two_sums else None,
            token_factor(state, token_clip) if direct and token_clip is not None else None,
        )
        stats[:STUDENT_LOG_PROB, rows] = statistics(state, rule)
        if targets is not None:
            local = targets[rows] - (0 if shards is None else shards.offset)
            roles = (student[rows], rule.transform), (teacher[rows], rule.of_teacher)
            for role, (hidden, transform) in enumerate(roles):
                z = target_logits(local, hidden.to(dtype), heads[role], transform)
                if shards is not None:
                    shards.sum_(z)
                normaliser = state[(states.STUDENT, states.TEACHER)[role]]
                z = (z - normaliser[states.MAX]) - states.log_sum(normaliser)
                stats[STUDENT_LOG_PROB + role, rows] = z
    del buffer, narrow
    return stats, *gradients.results()


def target_logits(targets: Tensor, hidden: Tensor, head: Head, transform: LogitTransform) -> Tensor:
    """[n]: each token's own logit, by itself: D multiply-adds. 0 for targets that are elsewhere."""
    size = len(head.weight)
    entry = targets.clamp(0, size - 1)
    z = (hidden * head.weight[entry].to(hidden.dtype)).sum(-1)
    if head.bias is not None:
        z = z + head.bias[entry]
    return transform(z).masked_fill_((targets < 0) | (targets >= size), 0.0)


def token_factor(state: Tensor, clip: Clip) -> Tensor:
    """[n]: what Clip("token") scales a token by."""
    d = state[states.DIVERGENCE]
    return torch.where(d > clip.threshold, clip.threshold / d, 1.0)


def statistics(state: Tensor, rule: Rule) -> Tensor:
    """[6, n] of a complete state."""
    d = state[states.DIVERGENCE]
    loss, clipped, inverted = d, torch.zeros_like(d), torch.zeros_like(d)
    if rule.entry_clip is not None:
        loss, clipped = state[states.CLIPPED], state[states.COUNT]
        inverted = ((state[states.DOT] < 0) & (clipped > 0)).to(d.dtype)
    elif (clip := rule.token_clip) is not None:
        loss, clipped = d * token_factor(state, clip), (d > clip.threshold).to(d.dtype)
    entropies = (states.entropy(state[role]) for role in (states.STUDENT, states.TEACHER))
    return torch.stack((loss, d, *entropies, clipped, inverted))
