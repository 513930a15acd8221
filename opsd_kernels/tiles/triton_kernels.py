"""The Triton kernels for `tiles/triton.py`. Imports triton.

A program computes one chunk of `BLOCK` consecutive entries of one row, for both roles, and stores
the chunk's sums in `partials` [sum, row, chunk]; a second kernel adds them to the row's state.
There are no atomics, and chunks have a fixed size: the result is bit for bit the same on any
device.

Every kernel is compiled without floating-point fusion, so that S = T gives exactly 0: both roles'
logits then come from the same roundings. Fused multiply-adds are written explicitly.

The per-entry functions follow csrc/divergence.h.
"""

import triton
import triton.language as tl

from opsd_kernels.divergence import DIVERGENCES
from opsd_kernels.tiles import state as states

FORWARD_KL = tl.constexpr(DIVERGENCES.index("forward_kl"))
REVERSE_KL = tl.constexpr(DIVERGENCES.index("reverse_kl"))
EVEN_JSD = tl.constexpr(len(DIVERGENCES))  # of beta 1/2
# Rows of the state that kernels read; a normaliser has MAX, REST and MOMENT, in this order.
TEACHER = tl.constexpr(states.TEACHER.start)
UNNORMALISED = tl.constexpr(states.UNNORMALISED)
CLIPPED_UNNORMALISED = tl.constexpr(states.CLIPPED_UNNORMALISED)
TARGET_WEIGHT = tl.constexpr(states.TARGET_WEIGHT)
NEAR = tl.constexpr(0.12)  # as in csrc/divergence.h


@triton.jit
def exp(x):
    """exp(x) in two instructions, 0 where it is subnormal; `tl.exp` takes three more for these."""
    return tl.exp2(x * 1.44269504)


@triton.jit
def _second_order(r):
    """(exp(r) - 1 - r) / r^2 for |r| <= ln 2 / 2."""
    p = tl.fma(r, 1.98412698e-4, 1.38888889e-3)
    p = tl.fma(p, r, 8.33333333e-3)
    p = tl.fma(p, r, 4.16666667e-2)
    p = tl.fma(p, r, 1.66666667e-1)
    return tl.fma(p, r, 0.5)


@triton.jit
def _exponential(x):
    """exp(x) = 2^n (1 + tail) for x in [-80, 0]: (n in the exponent's bits, tail)."""
    shifted = tl.fma(x, 1.44269504, 12582912.0)  # 1.5 * 2^23: n is in the low bits
    n = shifted - 12582912.0
    r = tl.fma(n, -0.693359375, x)
    r = tl.fma(n, 2.12194440e-4, r)
    return shifted.to(tl.int32, bitcast=True) << 23, tl.fma(r * r, _second_order(r), r)


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, accurate near 0."""
    shift, tail = _exponential(tl.where(x < -80.0, -80.0, x))
    power = (shift + 0x3F800000).to(tl.float32, bitcast=True)
    return tl.fma(power, tail, power - 1.0)


@triton.jit
def _log_of(u, y):
    """log u for a positive normal u, given its difference y from 1."""
    bits = u.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23  # u = m 2^k, m in [sqrt(1/2), sqrt(2))
    m = (bits - (k << 23)).to(tl.float32, bitcast=True)
    f = tl.where(k == 0, y, m - 1.0)
    s = f / (2.0 + f)
    z = s * s
    p = tl.fma(z, 1.0 / 9.0, 1.0 / 7.0)
    p = tl.fma(p, z, 1.0 / 5.0)
    p = tl.fma(p, z, 1.0 / 3.0)
    return tl.fma(k.to(tl.float32), 0.693147181, tl.fma(2.0 * s * z, p, 2.0 * s))


@triton.jit
def log1p(y):
    """log(1 + y) for y >= -1, accurate near 0, where the hardware's is off by 2e-7."""
    u = 1.0 + y
    edge = tl.where(u == 0.0, float("-inf"), u)  # the bits of 0, infinity and NaN have no logarithm
    return tl.where((u > 0.0) & (u < float("inf")), _log_of(u, y), edge)


@triton.jit
def _even(size):
    """csrc/divergence.h: (d/2) tanh(d/2) - log cosh(d/2) and log((1 + exp(-|d|)) / 2)."""
    square = size * size
    p = tl.fma(square, -1.66488009e-4, 1.73059838e-3)
    p = tl.fma(p, square, -1.56244509e-2)
    near = square * tl.fma(p, square, 1.24999991e-1)
    e = exp(-size)
    # log x = 2 artanh(s) with s = (x - 1) / (x + 1), here (e - 1) / (e + 3). A division takes more
    # instructions than a reciprocal root and one of Newton's steps.
    both = (1.0 + e) * (3.0 + e)
    root = tl.rsqrt(both)
    inverse = root * root
    inverse *= tl.fma(-both, inverse, 2.0)
    s = (e - 1.0) * ((1.0 + e) * inverse)
    z = s * s
    p = tl.fma(z, 2.81614538e-1, 2.79643447e-1)
    p = tl.fma(p, z, 4.00246513e-1)
    p = tl.fma(p, z, 6.66663204e-1)
    log_mean = s * tl.fma(p, z, 2.0)
    total = -size * (e * ((3.0 + e) * inverse))
    is_near = square < 0.5
    return tl.where(is_near, near, total - log_mean), tl.where(is_near, total - near, log_mean)


@triton.jit
def tanh(x):
    e = expm1(-2.0 * tl.abs(x))
    t = -e / (2.0 + e)
    return tl.where(x < 0.0, -t, t)


@triton.jit
def _product(p, log_ratio):
    return tl.where(p == 0.0, 0.0, p * log_ratio)


@triton.jit
def _logits(tile, bias, offset, entries, mask, inner, outer, SOFTCAP: tl.constexpr):
    """Load the products at `tile` + `offset` and transform them to logits; -inf where masked.
    inner: None for 1.
    """
    z = tl.load(tile + offset, mask=mask, other=0.0)
    if bias is not None:
        z += tl.load(bias + entries, mask=mask, other=0.0)
    if inner is not None:
        z *= inner
    if SOFTCAP:
        z = tanh(z) * outer
    return tl.where(mask, z, float("-inf"))


@triton.jit
def _through(z, inverse, SOFTCAP: tl.constexpr):
    """The soft cap's slope."""
    if SOFTCAP:
        t = z * inverse
        return 1.0 - t * t
    else:
        return 1.0


@triton.jit
def _normaliser(z, partials, place, stride):
    """Store MAX, REST and MOMENT of one chunk."""
    most = tl.max(z, 0)
    below = z - tl.where(most == float("-inf"), 0.0, most)
    p = exp(below)
    largest = below == 0.0  # counted separately
    rest = tl.sum(tl.where(largest, 0.0, p), 0)
    tl.store(partials + place, most)
    tl.store(partials + stride + place, (tl.sum(tl.where(largest, 1.0, 0.0), 0) - 1.0) + rest)
    # p is 0 below -104: 0 (-inf) would be NaN.
    tl.store(partials + 2 * stride + place, -tl.sum(p * tl.maximum(below, -110.0), 0))


@triton.jit
def _log_p(z, state, row, stride):
    """Subtract the maximum first, exactly, since z may be 1e4."""
    return (z - tl.load(state + row)) - log1p(tl.load(state + stride + row))


@triton.jit
def _bregman(p, q, r, plain):
    """p (r + exp(-r) - 1) with r = log p - log q."""
    square = r * r
    return tl.where(square < NEAR, p * (square * _second_order(-r)), plain + (q - p))


@triton.jit
def _entries(z, z_t, state, state_stride, row, beta, KIND: tl.constexpr):
    """(S, plain, term, unnormalised gradient: see `Entry` in csrc/divergence.h; and the part by
    which `term` differs from `plain`, which adds up to 0).
    """
    teacher = state + TEACHER * state_stride
    largest, largest_t = tl.load(state + row), tl.load(teacher + row)
    log_sum = log1p(tl.load(state + state_stride + row))
    log_sum_t = log1p(tl.load(teacher + state_stride + row))
    # Subtract the maximum first, exactly, since z may be 1e4.
    s = exp((z - largest) - log_sum)
    t = exp((z_t - largest_t) - log_sum_t)
    d = (z_t - z) - ((largest_t - largest) + (log_sum_t - log_sum))
    if KIND == FORWARD_KL:
        plain = _product(t, d)
        term = _bregman(t, s, d, plain)
        zero_sum = s - t
        unnormalised = -t
    elif KIND == REVERSE_KL:
        plain = _product(s, -d)
        term = _bregman(s, t, -d, plain)
        zero_sum = t - s
        unnormalised = plain
    elif KIND == EVEN_JSD:
        size = tl.abs(d)
        size = tl.where(size < 80.0, size, 80.0)  # infinite or NaN where S or T is 0
        value, log_mean = _even(size)
        unnormalised = -0.5 * s * (tl.where(d > 0.0, size, 0.0) + log_mean)
        plain = 0.5 * (s + t) * value
        term = plain
        zero_sum = s - s
    else:
        # log S - log M = -log(1 + b (e^d - 1)), exactly 0 where S = T. For d > 0 the roles swap, so
        # that the exponential never overflows.
        share = tl.where(d > 0.0, 1.0 - beta, beta)
        larger = -log1p(share * expm1(tl.where(d > 0.0, -d, d)))
        ratio_s = tl.where(d > 0.0, larger - d, larger)
        ratio_t = tl.where(d > 0.0, larger, larger + d)
        unnormalised = (1.0 - beta) * _product(s, ratio_s)
        plain = beta * _product(t, ratio_t) + unnormalised
        near = beta * (t * (ratio_t * ratio_t * _second_order(-ratio_t)))
        near += (1.0 - beta) * (s * (ratio_s * ratio_s * _second_order(-ratio_s)))
        term = tl.where(d * d < NEAR, near, plain)
        zero_sum = s - s
    return s, plain, term, unnormalised, zero_sum


@triton.jit
def _clipped_unnormalised(s, plain, unnormalised, threshold, KIND: tl.constexpr):
    if KIND == REVERSE_KL:
        # d(s log s/t) = log s/t + 1: the constant cancels only in the unclipped sum
        unnormalised += s
    return tl.where(plain > threshold, 0.0, unnormalised)


@triton.jit
def _place(chunks, BLOCK: tl.constexpr):
    """(row, in 64 bits since row * stride may exceed 2^31; chunk; the chunk's entries)."""
    program = tl.program_id(0)
    chunk = program % chunks
    return (program // chunks).to(tl.int64), chunk, chunk * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def normalisers(
    student,
    teacher,
    bias,
    teacher_bias,
    partials,
    partial_stride,
    v,
    chunks,
    student_stride,
    teacher_stride,
    inner,
    outer,
    teacher_inner,
    teacher_outer,
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store partials [6, n, chunks]: the student's, then the teacher's if there is one."""
    row, _, entries = _place(chunks, BLOCK)
    mask, partial = entries < v, tl.program_id(0)
    offset = row * student_stride + entries
    z = _logits(student, bias, offset, entries, mask, inner, outer, SOFTCAP)
    _normaliser(z, partials, partial, partial_stride)
    if teacher is not None:
        offset = row * teacher_stride + entries
        z_t = _logits(
            teacher,
            teacher_bias,
            offset,
            entries,
            mask,
            teacher_inner,
            teacher_outer,
            TEACHER_SOFTCAP,
        )
        _normaliser(z_t, partials + 3 * partial_stride, partial, partial_stride)


@triton.jit
def merge(partials, partial_stride, chunks, state, state_stride, BLOCK: tl.constexpr):
    """Merge a row's partial normalisers into the state. Grid: (rows, roles)."""
    row = tl.program_id(0)
    partials += 3 * tl.program_id(1) * partial_stride + row * chunks
    state += 3 * tl.program_id(1) * state_stride + row
    chunk = tl.arange(0, BLOCK)
    mask = chunk < chunks
    old, most = tl.load(state), tl.load(partials + chunk, mask=mask, other=float("-inf"))
    new = tl.maximum(old, tl.max(most, 0))
    rest = tl.load(partials + partial_stride + chunk, mask=mask, other=-1.0)
    moment = tl.load(partials + 2 * partial_stride + chunk, mask=mask, other=0.0)
    largest, rest, moment = _referred(most, rest, moment, new)
    old_rest = tl.load(state + state_stride)
    old_moment = tl.load(state + 2 * state_stride)
    old_largest, old_rest, old_moment = _referred(old, old_rest, old_moment, new)
    tl.store(state, new)
    count = (old_largest - 1.0) + tl.sum(largest, 0)
    tl.store(state + state_stride, count + (old_rest + tl.sum(rest, 0)))
    tl.store(state + 2 * state_stride, old_moment + tl.sum(moment, 0))


@triton.jit
def _referred(most, rest, moment, new):
    """A normaliser's sums relative to a larger maximum: (entries equal to it, sum of the others,
    moment). If nothing or only -inf was seen, all are 0, as the difference of the maxima is NaN.
    """
    shift, total, nothing = new - most, 1.0 + rest, rest == -1.0
    factor, same = exp(-shift), most == new
    moment = tl.where(same, moment, (moment + total * shift) * factor)
    rest = tl.where(same, rest, total * factor)
    largest = tl.where(same & ~nothing, 1.0, 0.0)
    return largest, tl.where(nothing, 0.0, rest), tl.where(nothing, 0.0, moment)


@triton.jit
def add(partials, partial_stride, chunks, state, state_stride, BLOCK: tl.constexpr):
    """Add a row's partial sums to the state's. Grid: (rows, sums)."""
    row = tl.program_id(0)
    chunk = tl.arange(0, BLOCK)
    place = partials + tl.program_id(1) * partial_stride + row * chunks + chunk
    total = tl.sum(tl.load(place, mask=chunk < chunks, other=0.0), 0)
    state += tl.program_id(1) * state_stride + row
    tl.store(state, tl.load(state) + total)


@triton.jit
def sums(
    student,
    teacher,
    bias,
    teacher_bias,
    state,
    state_stride,
    partials,
    partial_stride,
    v,
    chunks,
    student_stride,
    teacher_stride,
    inner,
    outer,
    teacher_inner,
    teacher_outer,
    beta,
    threshold,
    KIND: tl.constexpr,
    CLIP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials [2 or, with the entry clip, 5, n, chunks] of DIVERGENCE, UNNORMALISED, CLIPPED,
    COUNT and CLIPPED_UNNORMALISED.
    """
    row, _, entries = _place(chunks, BLOCK)
    mask, partial = entries < v, partials + tl.program_id(0)
    offset, offset_t = row * student_stride + entries, row * teacher_stride + entries
    z = _logits(student, bias, offset, entries, mask, inner, outer, SOFTCAP)
    z_t = _logits(
        teacher, teacher_bias, offset_t, entries, mask,
        teacher_inner, teacher_outer, TEACHER_SOFTCAP,
    )  # fmt: skip
    s, plain, term, unnormalised, zero_sum = _entries(z, z_t, state, state_stride, row, beta, KIND)
    tl.store(partial, tl.sum(term, 0))
    tl.store(partial + partial_stride, tl.sum(unnormalised, 0))
    if CLIP:
        over = plain > threshold
        clipped = _clipped_unnormalised(s, plain, unnormalised, threshold, KIND)
        bounded = tl.where(over, threshold + zero_sum, term)
        tl.store(partial + 2 * partial_stride, tl.sum(bounded, 0))
        tl.store(partial + 3 * partial_stride, tl.sum(tl.where(over, 1.0, 0.0), 0))
        tl.store(partial + 4 * partial_stride, tl.sum(clipped, 0))


@triton.jit
def gradient(
    student,
    teacher,
    bias,
    teacher_bias,
    out,
    out_stride,
    state,
    state_stride,
    row_weight,
    partials,
    partial_stride,
    v,
    chunks,
    student_stride,
    teacher_stride,
    inner,
    outer,
    teacher_inner,
    teacher_outer,
    inverse,
    factor,
    beta,
    threshold,
    KIND: tl.constexpr,
    CLIP: tl.constexpr,
    SUMS_KNOWN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`out` may be `student`; partials [1, n, chunks] of DOT with the entry clip, or
    [2, n, chunks] of DIVERGENCE and UNNORMALISED where the sums are unknown.
    """
    row, _, entries = _place(chunks, BLOCK)
    mask, partial = entries < v, partials + tl.program_id(0)
    offset, offset_t = row * student_stride + entries, row * teacher_stride + entries
    z = _logits(student, bias, offset, entries, mask, inner, outer, SOFTCAP)
    z_t = _logits(
        teacher, teacher_bias, offset_t, entries, mask,
        teacher_inner, teacher_outer, TEACHER_SOFTCAP,
    )  # fmt: skip
    s, plain, term, unnormalised, _ = _entries(z, z_t, state, state_stride, row, beta, KIND)
    if not SUMS_KNOWN:
        tl.store(partial, tl.sum(term, 0))
        tl.store(partial + partial_stride, tl.sum(unnormalised, 0))
    if row_weight is not None:
        scale = tl.load(row_weight + row) * factor * _through(z, inverse, SOFTCAP)
    if KIND == FORWARD_KL:
        g = s + unnormalised
    elif SUMS_KNOWN:
        g = unnormalised - s * tl.load(state + UNNORMALISED * state_stride + row)
    else:
        g = unnormalised
        tl.store(teacher + offset_t, s * scale, mask=mask)
    if CLIP:
        clipped = _clipped_unnormalised(s, plain, unnormalised, threshold, KIND)
        clipped -= s * tl.load(state + CLIPPED_UNNORMALISED * state_stride + row)
        tl.store(partial, tl.sum(g * clipped, 0))
        g = clipped
    if row_weight is not None:
        if SUMS_KNOWN or KIND == FORWARD_KL:
            g -= s * tl.load(state + TARGET_WEIGHT * state_stride + row)
        tl.store(out + row * out_stride + entries, g * scale, mask=mask)


@triton.jit
def target(
    logits, bias, targets, state, n, v, stride, inner, outer, SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add to `state` [n] the logit of each target that is in this tile."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(targets + row, mask=row < n, other=-1)
    here = (index >= 0) & (index < v)
    z = _logits(logits, bias, row.to(tl.int64) * stride + index, index, here, inner, outer, SOFTCAP)
    tl.store(state + row, tl.load(state + row, mask=here, other=0.0) + z, mask=here)


@triton.jit
def log_prob_gradient(
    logits,
    bias,
    out,
    out_stride,
    targets,
    state,
    state_stride,
    row_weight,
    v,
    chunks,
    stride,
    inner,
    outer,
    inverse,
    factor,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, _, entries = _place(chunks, BLOCK)
    mask, offset = entries < v, row * stride + entries
    z = _logits(logits, bias, offset, entries, mask, inner, outer, SOFTCAP)
    p = exp(_log_p(z, state, row, state_stride))
    g = tl.where(entries == tl.load(targets + row), 1.0, 0.0) - p
    scale = tl.load(row_weight + row) * factor * _through(z, inverse, SOFTCAP)
    tl.store(out + row * out_stride + entries, g * scale, mask=mask)


@triton.jit
def scale(x, by, count, BLOCK: tl.constexpr):
    """Multiply by the scalar at `by`; if that is 1, nothing is read."""
    factor = tl.load(by)
    if factor != 1.0:
        entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = entry < count
        scaled = tl.load(x + entry, mask=mask, other=0.0).to(tl.float32) * factor
        tl.store(x + entry, scaled, mask=mask)
