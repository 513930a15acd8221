"""Tile functions in plain torch operations: any device, fp32 and fp64 tiles. This module also has
the contract of all backends.

A tile [n, v] has *products* h W^T of n tokens and v consecutive vocabulary rows, in fp32 (in this
backend also fp64). Entries are contiguous, rows have any stride; n * stride may exceed 2^31. Only
`gradient_` and `log_prob_gradient_` write to tiles. Each function transforms products to logits
itself, z = softcap(scale * (product + bias)) / temperature (the teacher's by `rule.of_teacher`),
since a tile may be computed again between them. A role's product and bias [v] (contiguous, of the
tile's dtype, or None) are its `Logits`; a `Rule` says what is measured.

`state` [13, n] (see `state.py`) has contiguous rows. All vocabulary tiles must have passed through
one function before the next one starts:

normalisers(student, teacher, rule, state)
    adds the tile to both roles' MAX, REST and MOMENT.

sums(student, teacher, rule, state)
    given both normalisers, adds to DIVERGENCE and UNNORMALISED, and with an entry clip to CLIPPED,
    COUNT and CLIPPED_UNNORMALISED. Each term is computed separately and is not negative, so there
    is no difference of large sums.

gradient_(student, teacher, rule, state, row_weight, sums_known=True, out=None)
    overwrites `out` [n, v] (fp32, bf16 or fp16), or without one the student's product, with
    row_weight [n] times the derivative of the clipped (entry) or unclipped divergence by it. The
    caller includes the token clip in row_weight. TARGET_WEIGHT times S is subtracted: with the
    target's entry, which the caller adds, that is the gradient of its log-probability. With an
    entry clip it adds to DOT; row_weight may then be None, and no gradient is written.
    sums_known=False (never with an entry clip): this is the first sweep since the normalisers, so
    it adds what `sums` would have added. forward_kl's gradient, which needs no sum, is written. For
    the others, whose gradient p - S sum p needs the sum, the student's product becomes
    row_weight times p, and the teacher's row_weight times S (both by the product); never with
    `out`.

log_prob_normalisers(logits, targets, transform, state)
    `state` [4, n]: adds to MAX, REST and MOMENT, and the target's logit to TARGET. `targets` [n]
    (int64) count from the tile's first entry: those outside [0, v) are in another tile.

log_prob_gradient_(logits, targets, transform, state, row_weight, out=None)
    overwrites `out`, or the product, with row_weight times the derivative of the target's
    log-probability.

A backend may also have

rows(student, teacher, rule, state, row_weight, out=None)
    normalisers (unless the state has them), sums and (row_weight not None, or an entry clip)
    gradient_ at once, on tiles with whole rows, with the token clip applied to row_weight. It may
    overwrite both tiles. With row_fits(device, v): whether it can do so there.

`TEMPORARIES` is the number of tensors of n v items that they allocate while they work
(`LOG_PROB_TEMPORARIES` for the log_prob functions, if it exists); if there is a
`slice_entries(device)`, the tensors have at most as many items. Identical rows give exactly 0,
entries of probability 0 do not count, NaN stays NaN.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from opsd_kernels.divergence import Clip, Divergence, LogitTransform, Rule
from opsd_kernels.tiles import state as rows_of
from opsd_kernels.tiles.logits import Logits
from opsd_kernels.tiles.state import MAX, STUDENT, TEACHER

TEMPORARIES = 7
LOG_PROB_TEMPORARIES = 3


def slice_entries(device: torch.device) -> int:
    """The entries to work on at a time, so that temporaries are small. On the CPU they stay in its
    cache and fragment no memory. A GPU needs enough work for each launch.
    """
    return 2**15 if device.type == "cpu" else 2**23


def _in_slices(function: Callable[..., None]) -> Callable[..., None]:
    """Decorate a tile function to be called on a part of the tile at a time."""
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def sliced(*arguments) -> None:
        for columns, spans in _slices(arguments[0]):
            for rows in spans:
                parts = zip(names, arguments, strict=False)
                function(*(_part(name, x, rows, columns) for name, x in parts))

    return sliced


def _slices(logits: Logits) -> Iterator[tuple[slice, Iterator[slice]]]:
    """Yield some columns of the tile, with the spans of rows to combine with them."""
    n, v = logits.product.shape
    entries = slice_entries(logits.product.device)
    for columns in _spans(v, entries):
        yield columns, _spans(n, max(1, entries // max(v, 1)))


def _spans(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, start + step)


def _part(name: str, x, rows: slice, columns: slice):
    """The part of a tile function's argument for these rows and columns."""
    if isinstance(x, Logits):
        bias = None if x.bias is None else x.bias[columns]
        return Logits(x.product[rows, columns], bias)
    if name == "state":
        return x[:, rows]
    if name == "row_weight":
        return None if x is None else x[rows]
    if name == "out":
        return None if x is None else x[rows, columns]
    return x[rows] - columns.start if name == "targets" else x


def normalisers(student: Logits, teacher: Logits, rule: Rule, state: Tensor) -> None:
    _add_normaliser(student, rule.transform, state[STUDENT])
    _add_normaliser(teacher, rule.of_teacher, state[TEACHER])


@_in_slices
def sums(student: Logits, teacher: Logits, rule: Rule, state: Tensor) -> None:
    z, z_t = _z(student, rule.transform), _z(teacher, rule.of_teacher)
    _add_sums(_entries(z, z_t, rule, state, gradient=False), rule, state)


@_in_slices
def gradient_(
    student: Logits,
    teacher: Logits,
    rule: Rule,
    state: Tensor,
    row_weight: Tensor | None,
    sums_known: bool = True,
    out: Tensor | None = None,
) -> None:
    transform, clip = rule.transform, rule.entry_clip
    z = _z(student, transform)
    slope = None if row_weight is None else _slope(z, transform)
    z_t = _z(teacher, rule.of_teacher)
    entries = _entries(z, z_t, rule, state, gradient=True)
    s, p = entries.s, entries.unnormalised
    forward = rule.divergence.name == "forward_kl"
    factor = None if row_weight is None else _factor(row_weight, transform, slope)
    if not sums_known:
        assert clip is None
        _add_sums(entries, rule, state)
        if not forward:
            assert out is None
            student.product.copy_(p.mul_(factor))
            teacher.product.copy_(s.mul_(factor))
            return
    by_target, sum_p = state[rows_of.TARGET_WEIGHT], state[rows_of.UNNORMALISED]
    if forward:
        sum_p = torch.full_like(sum_p, -1.0)
    if clip is not None:
        clipped = _clipped_unnormalised(entries, rule.divergence, clip)
        of_clipped = state[rows_of.CLIPPED_UNNORMALISED]
        state[rows_of.DOT] += _less(p, s, sum_p).mul_(_less(clipped, s, of_clipped)).sum(-1)
        p, sum_p = clipped, of_clipped
    g = _less(p, s, sum_p + by_target)
    if row_weight is not None:
        (student.product if out is None else out).copy_(g.mul_(factor))


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
    logits: Logits,
    targets: Tensor,
    transform: LogitTransform,
    state: Tensor,
    row_weight: Tensor,
    out: Tensor | None = None,
) -> None:
    z = _z(logits, transform)
    slope = _slope(z, transform)
    g = _log_p(z, state[STUDENT]).exp_().neg_()
    here = (targets >= 0) & (targets < z.shape[1])
    index = targets.clamp(0, z.shape[1] - 1)[:, None]
    g.scatter_(-1, index, g.gather(-1, index) + here[:, None])
    product = logits.product if out is None else out
    product.copy_(g.mul_(_factor(row_weight, transform, slope)))


def _z(logits: Logits, transform: LogitTransform) -> Tensor:
    """Transform products to logits, in a new tensor."""
    cap, (product, bias) = transform.softcap, logits
    z = product.clone() if bias is None else product + bias
    if cap is None:
        return z.mul_(transform.scale / transform.temperature)
    return z.mul_(transform.scale / cap).tanh_().mul_(cap / transform.temperature)


def _slope(z: Tensor, transform: LogitTransform) -> Tensor | None:
    """The soft cap's slope, 1 - tanh^2; None without one."""
    if transform.softcap is None:
        return None
    return (z * (transform.temperature / transform.softcap)).square_().neg_().add_(1.0)


def _factor(row_weight: Tensor, transform: LogitTransform, slope: Tensor | None) -> Tensor:
    factor = (row_weight * (transform.scale / transform.temperature))[:, None]
    return factor if slope is None else slope.mul_(factor)


def _add_normaliser(logits: Logits, transform: LogitTransform, normaliser: Tensor) -> None:
    """Add a tile to `normaliser` [3, n]. All rows are merged at once: a merge is thirty small
    operations.
    """
    for columns, spans in _slices(logits):
        seen = torch.empty_like(normaliser)
        for rows in spans:
            part = _part("logits", logits, rows, columns)
            seen[:, rows] = _normaliser(_z(part, transform))
        rows_of.merge_(normaliser, seen)


def _normaliser(z: Tensor) -> Tensor:
    """The normaliser [3, n] of only these entries [n, v]. Overwrites `z`."""
    most = z.amax(-1)
    below = z.sub_(most.masked_fill(most == -torch.inf, 0.0)[:, None])
    # Below this exp is 0; without the bound, 0 * -inf would be NaN.
    p = below.clamp_(min=-104.0 if z.dtype == torch.float32 else -746.0).exp()
    rest = p.sum(-1, dtype=torch.float64) - 1.0
    return torch.stack((most, rest.to(z.dtype), below.mul_(p).sum(-1).neg_()))


def _log_p(z: Tensor, normaliser: Tensor) -> Tensor:
    """Subtract the maximum first, exactly, since z may be 1e4. In place."""
    return z.sub_(normaliser[MAX][:, None]).sub_(rows_of.log_sum(normaliser)[:, None])


def _shift(state: Tensor) -> Tensor:
    """The teacher's log-normaliser minus the student's [n]."""
    student, teacher = state[STUDENT], state[TEACHER]
    logs = rows_of.log_sum(teacher) - rows_of.log_sum(student)
    return (teacher[MAX] - student[MAX]) + logs


class _Entries(NamedTuple):
    """Values for each entry [n, v]: S and T (None if a KL needs only one of them); for the KLs log
    q - log p, and whether some p is not a normal number; the unnormalised gradient; and the terms
    of the divergence as it is defined.
    """

    s: Tensor | None
    t: Tensor | None
    log_ratio: Tensor | None
    rare: bool
    unnormalised: Tensor
    plain: Tensor


def _entries(z: Tensor, z_t: Tensor, rule: Rule, state: Tensor, *, gradient: bool) -> _Entries:
    """Compute the entries, overwriting the logits. `gradient`: for the gradient, not only the
    sums.
    """
    # (t - z) - (difference of log-normalisers) keeps the digits of a small log ratio; log T - log S
    # would have only those of log T.
    divergence, student, teacher = rule.divergence, state[STUDENT], state[TEACHER]
    clips = rule.entry_clip is not None
    shift = _shift(state)[:, None]
    if divergence.name == "forward_kl":
        log_ratio = (z - z_t).add_(shift)
        t = _log_p(z_t, teacher).exp_()
        rare = _rare(t)
        s = _log_p(z, student).exp_() if rare or clips or gradient else None
        return _Entries(s, t, log_ratio, rare, -t, _product(log_ratio, t, rare).neg_())
    log_ratio = (z_t - z).sub_(shift)
    s = _log_p(z, student).exp_()
    if divergence.name == "reverse_kl":
        rare = _rare(s)
        t = _log_p(z_t, teacher).exp_() if rare or clips else None
        unnormalised = _product(log_ratio, s, rare).neg_()
        return _Entries(s, t, log_ratio, rare, unnormalised, unnormalised)
    t = _log_p(z_t, teacher).exp_()
    # With d = log T - log S: log S - log M = -log(1 + b (e^d - 1)), exactly 0 where S = T. For
    # d > 0 the roles swap, so that the exponential never overflows.
    b, d = divergence.beta, log_ratio
    share = (d > 0).to(d.dtype).mul_(1 - 2 * b).add_(b)
    larger = share.mul_(d.abs().neg_().expm1_()).log1p_().neg_()
    unnormalised = _product(larger - d.clamp(min=0), s, _rare(s)).mul_(1 - b)
    plain = _product(larger.add_(d.clamp_(max=0)), t, _rare(t)).mul_(b).add_(unnormalised)
    return _Entries(s, t, None, False, unnormalised, plain)


def _rare(p: Tensor) -> bool:
    """Whether some p may be 0, NaN or subnormal. On a GPU always True, as testing would wait for
    it.
    """
    return p.device.type != "cpu" or not bool(p.amin() >= torch.finfo(p.dtype).tiny)


def _terms(entries: _Entries, divergence: Divergence) -> Tensor:
    """The terms plus amounts that add up to 0, so that none is negative; see csrc/divergence.h.
    Overwrites the log ratio.
    """
    if entries.log_ratio is None:
        return entries.plain
    p, q = (entries.t, entries.s)[:: 1 if divergence.name == "forward_kl" else -1]
    # p (exp(l) - 1 - l), l = log q - log p: exp(l) overflows only where p is subnormal.
    terms = torch.addcmul(entries.plain, p, entries.log_ratio.expm1_())
    return torch.where(p < torch.finfo(p.dtype).tiny, q, terms) if entries.rare else terms


def _add_sums(entries: _Entries, rule: Rule, state: Tensor) -> None:
    terms = _terms(entries, rule.divergence)
    state[rows_of.DIVERGENCE] += terms.sum(-1).clamp_(min=0.0)
    state[rows_of.UNNORMALISED] += entries.unnormalised.sum(-1)
    clip = rule.entry_clip
    if clip is not None:
        s, t = entries.s, entries.t
        zero_sum = {"forward_kl": s - t, "reverse_kl": t - s, "jsd": 0.0 * s}[rule.divergence.name]
        over = entries.plain > clip.threshold
        state[rows_of.CLIPPED] += torch.where(over, zero_sum + clip.threshold, terms).sum(-1)
        state[rows_of.COUNT] += over.sum(-1)
        clipped = _clipped_unnormalised(entries, rule.divergence, clip)
        state[rows_of.CLIPPED_UNNORMALISED] += clipped.sum(-1)


def _less(p: Tensor, s: Tensor, times: Tensor) -> Tensor:
    """p - S * `times` [n]."""
    return torch.addcmul(p, s, times[:, None], value=-1)


def _clipped_unnormalised(entries: _Entries, divergence: Divergence, clip: Clip) -> Tensor:
    # d(s log s/t) = log s/t + 1: the constant cancels only in the unclipped gradient.
    p = entries.unnormalised
    everything = p + entries.s if divergence.name == "reverse_kl" else p
    return everything.masked_fill(entries.plain > clip.threshold, 0.0)


def _product(log_ratio: Tensor, p: Tensor, rare: bool) -> Tensor:
    """p * log_ratio with 0 * anything = 0. A NaN in p stays one."""
    product = log_ratio * p
    return product.masked_fill_(p == 0, 0.0) if rare else product
