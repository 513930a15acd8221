"""Tile functions in plain torch operations: any device, fp32 and fp64 tiles. Also the contract of
every backend's.

A tile [n, v] holds *products* h W^T of n tokens and v consecutive vocabulary rows, in fp32 (this
backend: fp64 too), entries contiguous, rows at any stride; n * stride may exceed 2^31. Nothing but
`gradient_` and `log_prob_gradient_` writes to tiles: each function goes from the product to the
logit itself, z = softcap(scale * (product + bias)) / temperature, since a tile may be computed anew
between them. A role's product and bias [v] (contiguous, of the tile's dtype, or None) are its
`Logits`; a `Rule` says what is measured.

`state` [12, n] (see `state.py`) has contiguous rows. All vocabulary tiles must have passed through
one function before the next one starts:

normalisers(student, teacher, rule, state)
    adds the tile to both roles' MAX, SUM and MOMENT.

sums(student, teacher, rule, state)
    given both normalisers, adds to DIVERGENCE and PULL, and with an entry clip to CLIPPED, COUNT
    and CLIPPED_PULL. Each term is computed by itself: no difference of large sums.

gradient_(student, teacher, rule, state, row_weight, sums_known=True)
    overwrites the student's product with row_weight [n] times the derivative of the clipped (entry)
    or unclipped divergence by it. The token clip is a matter of row_weight: the caller's.
    With an entry clip it adds to DOT; row_weight may then be None: no gradient is written.
    sums_known=False (never with an entry clip): the first sweep since the normalisers, so it adds
    what `sums` would have added. forward_kl's gradient needs no sum, and is written all the same.
    For the others, whose gradient p - S sum p waits for the sum, the student's product becomes
    row_weight times p, and the teacher's row_weight times S (both by the product).

log_prob_normalisers(logits, targets, transform, state)
    `state` [4, n]: adds to MAX, SUM and MOMENT, and the target's logit to TARGET. `targets` [n]
    (int64) count from the tile's first entry: those outside [0, v) lie in another tile.

log_prob_gradient_(logits, targets, transform, state, row_weight)
    overwrites the product with row_weight times the derivative of the target's log-probability.

A backend may offer beside these

rows(student, teacher, rule, state, row_weight)
    normalisers, sums and (row_weight not None, or an entry clip) gradient_ at once, on tiles that
    hold whole rows, with the token clip applied to row_weight. It may overwrite both tiles.

`TEMPORARIES` is how many tensors of n v items they allocate while they work, of the log_prob
functions `LOG_PROB_TEMPORARIES` where there is one; where there is a `slice_entries(device)`, of as
many items at most.
Identical rows give exactly 0, entries of probability 0 count for nothing, NaN stays NaN.
"""

import functools
import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from opsd_kernels.divergence import Clip, Divergence, LogitTransform, Rule
from opsd_kernels.tiles import state as rows_of
from opsd_kernels.tiles.logits import Logits
from opsd_kernels.tiles.state import MAX, STUDENT, SUM, TEACHER

TEMPORARIES = 7
LOG_PROB_TEMPORARIES = 3


def slice_entries(device: torch.device) -> int:
    """Entries worked on at a time, so that the temporaries are small: on the CPU they stay in its
    cache, and are too small for the allocator to leave holes that count. A GPU needs more to work
    on than a launch costs.
    """
    return 2**15 if device.type == "cpu" else 2**23


def _in_slices(function: Callable[..., None]) -> Callable[..., None]:
    """Call it on a part of the tile at a time."""
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def sliced(*arguments) -> None:
        tile = arguments[0].product
        n, v = tile.shape
        entries = slice_entries(tile.device)
        for rows in _spans(n, max(1, entries // max(v, 1))):
            for columns in _spans(v, entries):
                parts = zip(names, arguments, strict=False)
                function(*(_part(name, x, rows, columns) for name, x in parts))

    return sliced


def _spans(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, start + step)


def _part(name: str, x, rows: slice, columns: slice):
    """An argument of a tile function, of some of the tile's rows and columns only."""
    if isinstance(x, Logits):
        bias = None if x.bias is None else x.bias[columns]
        return Logits(x.product[rows, columns], bias)
    if name == "state":
        return x[:, rows]
    if name == "row_weight":
        return None if x is None else x[rows]
    return x[rows] - columns.start if name == "targets" else x


@_in_slices
def normalisers(student: Logits, teacher: Logits, rule: Rule, state: Tensor) -> None:
    rows_of.merge_(state[STUDENT], _normaliser(_z(student, rule.transform)))
    rows_of.merge_(state[TEACHER], _normaliser(_z(teacher, rule.transform)))


@_in_slices
def sums(student: Logits, teacher: Logits, rule: Rule, state: Tensor) -> None:
    z, z_t = _z(student, rule.transform), _z(teacher, rule.transform)
    s, terms, pull = _entries(z, z_t, rule.divergence, state)
    _add_sums(s, terms, pull, rule, state)


@_in_slices
def gradient_(
    student: Logits,
    teacher: Logits,
    rule: Rule,
    state: Tensor,
    row_weight: Tensor | None,
    sums_known: bool = True,
) -> None:
    transform, clip = rule.transform, rule.entry_clip
    z = _z(student, transform)
    slope = None if row_weight is None else _slope(z, transform)
    z_t = _z(teacher, transform)
    s, terms, pull = _entries(z, z_t, rule.divergence, state)
    forward = rule.divergence.name == "forward_kl"
    factor = None if row_weight is None else _factor(row_weight, transform, slope)
    if not sums_known:
        assert clip is None
        _add_sums(s, terms, pull, rule, state)
        if not forward:
            student.product.copy_(pull.mul_(factor))
            teacher.product.copy_(s.mul_(factor))
            return
    g = pull + s if forward else pull - s * state[rows_of.PULL][:, None]
    if clip is not None:
        clipped = _clipped_pull(s, terms, pull, rule.divergence, clip)
        clipped -= s.mul_(state[rows_of.CLIPPED_PULL][:, None])
        state[rows_of.DOT] += g.mul_(clipped).sum(-1)
        g = clipped
    if row_weight is not None:
        student.product.copy_(g.mul_(factor))


@_in_slices
def log_prob_normalisers(
    logits: Logits, targets: Tensor, transform: LogitTransform, state: Tensor
) -> None:
    z = _z(logits, transform)
    here = (targets >= 0) & (targets < z.shape[1])
    chosen = z.gather(-1, targets.clamp(0, z.shape[1] - 1)[:, None]).squeeze(-1)
    state[rows_of.TARGET] += chosen.masked_fill_(~here, 0.0)
    rows_of.merge_(state[STUDENT], _normaliser(z))


@_in_slices
def log_prob_gradient_(
    logits: Logits, targets: Tensor, transform: LogitTransform, state: Tensor, row_weight: Tensor
) -> None:
    z = _z(logits, transform)
    slope = _slope(z, transform)
    g = _log_p(z, state[STUDENT]).exp_().neg_()
    here = (targets >= 0) & (targets < z.shape[1])
    index = targets.clamp(0, z.shape[1] - 1)[:, None]
    g.scatter_(-1, index, g.gather(-1, index) + here[:, None])
    logits.product.copy_(g.mul_(_factor(row_weight, transform, slope)))


def _z(logits: Logits, transform: LogitTransform) -> Tensor:
    """Transformed: a new tensor."""
    cap, (product, bias) = transform.softcap, logits
    z = product.clone() if bias is None else product + bias
    if cap is None:
        return z.mul_(transform.scale / transform.temperature)
    return z.mul_(transform.scale / cap).tanh_().mul_(cap / transform.temperature)


def _slope(z: Tensor, transform: LogitTransform) -> Tensor | None:
    """The soft cap's, 1 - tanh^2, where there is one."""
    if transform.softcap is None:
        return None
    return (z * (transform.temperature / transform.softcap)).square_().neg_().add_(1.0)


def _factor(row_weight: Tensor, transform: LogitTransform, slope: Tensor | None) -> Tensor:
    factor = (row_weight * (transform.scale / transform.temperature))[:, None]
    return factor if slope is None else slope.mul_(factor)


def _normaliser(z: Tensor) -> Tensor:
    """[n, v] -> [3, n] of these entries alone. Overwrites `z`."""
    most = z.amax(-1)
    below = z.sub_(most.masked_fill(most == -torch.inf, 0.0)[:, None])
    p = below.exp()
    moment = below.mul_(p).masked_fill_(p == 0, 0.0).sum(-1).neg_()
    return torch.stack((most, p.sum(-1), moment))


def _log_p(z: Tensor, normaliser: Tensor) -> Tensor:
    """In place. The maximum is subtracted by itself, exactly: z may be 1e4."""
    return z.sub_(normaliser[MAX][:, None]).sub_(normaliser[SUM].log()[:, None])


def _entries(
    z: Tensor, z_t: Tensor, divergence: Divergence, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(S, terms of the divergence's sum, pull) of each entry; overwrites the logits."""
    log_s, log_t = _log_p(z, state[STUDENT]), _log_p(z_t, state[TEACHER])
    if divergence.name == "forward_kl":
        t = log_t.exp()
        terms = _product_(log_t.sub_(log_s), t)
        return log_s.exp_(), terms, t.neg_()
    s = log_s.exp()
    if divergence.name == "reverse_kl":
        pull = _product_(log_s.sub_(log_t), s)
        return s, pull, pull
    # log S - log M = -log(1 + b (e^d - 1)) with d = log T - log S: exactly 0 where S = T. For d > 0
    # the roles swap, so that the exponential never overflows.
    b = divergence.beta
    t = log_t.exp()
    d = log_t.sub_(log_s)
    share = (d > 0).to(d.dtype).mul_(1 - 2 * b).add_(b)
    larger = share.mul_(d.abs().neg_().expm1_()).log1p_().neg_()
    pull = _product_(d.clamp(min=0).neg_().add_(larger), s).mul_(1 - b)
    terms = _product_(larger.add_(d.clamp_(max=0)), t).mul_(b).add_(pull)
    return s, terms, pull


def _add_sums(s: Tensor, terms: Tensor, pull: Tensor, rule: Rule, state: Tensor) -> None:
    state[rows_of.DIVERGENCE] += terms.sum(-1)
    state[rows_of.PULL] += pull.sum(-1)
    clip = rule.entry_clip
    if clip is not None:
        state[rows_of.CLIPPED] += terms.clamp(max=clip.threshold).sum(-1)
        state[rows_of.COUNT] += (terms > clip.threshold).sum(-1)
        clipped = _clipped_pull(s, terms, pull, rule.divergence, clip)
        state[rows_of.CLIPPED_PULL] += clipped.sum(-1)


def _clipped_pull(
    s: Tensor, terms: Tensor, pull: Tensor, divergence: Divergence, clip: Clip
) -> Tensor:
    # d(s log s/t) = log s/t + 1: the constant vanishes from the unclipped gradient only.
    whole = pull + s if divergence.name == "reverse_kl" else pull
    return whole.masked_fill(terms > clip.threshold, 0.0)


def _product_(log_ratio: Tensor, p: Tensor) -> Tensor:
    """p * log_ratio in place of log_ratio, with 0 * anything = 0. A NaN in p stays one."""
    return log_ratio.mul_(p).masked_fill_(p == 0, 0.0)
