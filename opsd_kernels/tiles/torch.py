"""Tile functions in plain torch operations: any device, fp32 and fp64 tiles. Also the contract of
every backend's.

`divergence_rows` gets the products h W^T of both roles for n tokens and leaves in

    stats [5, n]  the loss's divergence (after the clip), the divergence, the student's and the
                  teacher's entropy, and the number of clipped entries (entry clip) or 1 where
                  the token was clipped (token clip)
    opposed [n]   1 where the clipped gradient points away from the unclipped one (entry clip;
                  otherwise left as it is)

With `row_weight` [n] it overwrites `student` with row_weight times the gradient of the loss's
divergence with respect to the *product* h W^T + bias. Both tiles may be overwritten in any case.
"""

import torch
from torch import Tensor

from opsd_kernels.divergence import Clip, Divergence, LogitTransform

TILES = 2 + 7  # both tiles and up to seven temporaries of their size


def divergence_rows(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    divergence: Divergence,
    transform: LogitTransform,
    clip: Clip | None,
    row_weight: Tensor | None,
    stats: Tensor,
    opposed: Tensor,
) -> None:
    slope = _transform_(student, bias, transform, need_slope=row_weight is not None)
    _transform_(teacher, teacher_bias, transform, need_slope=False)
    log_s = student.sub_(student.logsumexp(-1, keepdim=True))
    log_t = teacher.sub_(teacher.logsumexp(-1, keepdim=True))
    s, t = log_s.exp(), log_t.exp()
    stats[2] = -_sum_product(s, log_s)
    stats[3] = -_sum_product(t, log_t)

    # terms: of the divergence's sum; q: what the gradient S (q - sum S q) is made of (for
    # forward_kl it is q = -T / S, so that S q is written as -T).
    if divergence.name == "forward_kl":
        terms = _product_(log_t.sub_(log_s), t)
        q = None
    else:
        b = divergence.beta
        if divergence.name == "reverse_kl":
            q = log_s.sub_(log_t)
            q.masked_fill_(s == 0, 0.0)
            terms = q * s
            factor = 1.0
        else:
            # log S - log M = -log(1 + b (e^d - 1)) with d = log T - log S: exactly 0 where
            # S = T. For d > 0 the roles swap, so that the exponential never overflows.
            d = log_t.sub_(log_s)
            share = (d > 0).to(d.dtype).mul_(1 - 2 * b).add_(b)
            larger = share.mul_(torch.expm1(-d.abs())).log1p_().neg_()
            q = larger - d.clamp(min=0)
            q.masked_fill_(s == 0, 0.0)
            terms = _product_(larger.add_(d.clamp_(max=0)), t).mul_(b)
            terms.add_(q * s, alpha=1 - b)
            factor = 1 - b
        q.mul_(factor)
    stats[1] = terms.sum(-1)
    stats[0] = stats[1]
    if row_weight is None and not (clip and clip.kind == "entry"):
        if clip:
            _clip_token(stats, clip)
        return

    def gradient(mask: Tensor | None) -> Tensor:
        if q is None:
            pull = t if mask is None else t * mask
            total = 1.0 if mask is None else pull.sum(-1, keepdim=True)
            return (s * total).sub_(pull)
        if mask is not None:
            # d(s log s/t) = log s/t + 1: the constant vanishes from the unclipped gradient only.
            masked = (q + 1.0 if divergence.name == "reverse_kl" else q) * mask
        else:
            masked = q
        return (masked - (s * masked).sum(-1, keepdim=True)).mul_(s)

    if clip and clip.kind == "entry":
        over = terms > clip.threshold
        stats[0] = terms.clamp_(max=clip.threshold).sum(-1)
        stats[4] = over.sum(-1)
        g = gradient(over.logical_not_())
        opposed.copy_(((g * gradient(None)).sum(-1) < 0) & (stats[4] > 0))
    else:
        g = gradient(None)
    factor = 1.0
    if clip and clip.kind == "token":
        factor = _clip_token(stats, clip)
    if row_weight is not None:
        g.mul_((row_weight * (factor * transform.scale / transform.temperature))[:, None])
        student.copy_(g if slope is None else g.mul_(slope))


def log_prob_rows(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    row_weight: Tensor | None,
    stats: Tensor,
) -> None:
    """stats [2, n]: the target's log-probability and the entropy. With `row_weight` the gradient
    of the former, in place.
    """
    slope = _transform_(logits, bias, transform, need_slope=row_weight is not None)
    log_p = logits.sub_(logits.logsumexp(-1, keepdim=True))
    p = log_p.exp()
    stats[0] = log_p.gather(-1, targets[:, None]).squeeze(-1)
    stats[1] = -_sum_product(p, log_p)
    if row_weight is None:
        return
    g = p.neg_()
    g.scatter_add_(-1, targets[:, None], torch.ones_like(g[:, :1]))
    g.mul_((row_weight * (transform.scale / transform.temperature))[:, None])
    logits.copy_(g if slope is None else g.mul_(slope))


def _transform_(
    tile: Tensor, bias: Tensor | None, transform: LogitTransform, *, need_slope: bool
) -> Tensor | None:
    """The product becomes the logit, in place. Returns the soft cap's slope, 1 - tanh^2, where
    there is one.
    """
    if bias is not None:
        tile.add_(bias)
    cap = transform.softcap
    slope = None
    if cap is None:
        tile.mul_(transform.scale / transform.temperature)
    else:
        tile.mul_(transform.scale / cap).tanh_()
        slope = tile.square().neg_().add_(1.0) if need_slope else None
        tile.mul_(cap / transform.temperature)
    return slope


def _product_(log_ratio: Tensor, p: Tensor) -> Tensor:
    """p * log_ratio in place of log_ratio, with 0 * anything = 0. A NaN in p stays one."""
    return log_ratio.mul_(p).masked_fill_(p == 0, 0.0)


def _sum_product(p: Tensor, log_p: Tensor) -> Tensor:
    return (p * log_p).masked_fill_(p == 0, 0.0).sum(-1)


def _clip_token(stats: Tensor, clip: Clip) -> Tensor:
    """min(1, threshold / D) of each token, applied to the loss's divergence."""
    over = stats[1] > clip.threshold
    factor = torch.where(over, clip.threshold / stats[1], 1.0)
    stats[0] = stats[1] * factor
    stats[4] = over
    return factor
