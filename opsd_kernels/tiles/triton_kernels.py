"""The Triton kernels behind `tiles/triton.py`. Imports triton.

A program works on one chunk of `BLOCK` consecutive entries of one row, for both roles, and leaves
its part of each sum in `parts` [sum, row, chunk]; a second kernel adds a row's parts to the state.
No atomics, and chunks of a fixed size: the result is the same bit for bit, on any device.

Every kernel is compiled with floating-point fusion off, so that S = T gives exactly 0: both roles'
logits then come from the same roundings. Where a fused multiply-add is wanted it is written out.

The per-entry functions follow csrc/divergence.h.
"""

import triton
import triton.language as tl

from opsd_kernels.divergence import DIVERGENCES
from opsd_kernels.tiles import state as states

FORWARD_KL = tl.constexpr(DIVERGENCES.index("forward_kl"))
REVERSE_KL = tl.constexpr(DIVERGENCES.index("reverse_kl"))
# Rows of the state that kernels read; a normaliser has MAX, SUM and MOMENT, in this order.
TEACHER = tl.constexpr(states.TEACHER.start)
PULL, CLIPPED_PULL = tl.constexpr(states.PULL), tl.constexpr(states.CLIPPED_PULL)


@triton.jit
def _exponential(x):
    """exp(x) = 2^n (1 + tail) for x in [-80, 0]: (n in the exponent's place, tail)."""
    shifted = tl.fma(x, 1.44269504, 12582912.0)  # 1.5 * 2^23: n is in the low bits
    n = shifted - 12582912.0
    r = tl.fma(n, -0.693359375, x)
    r = tl.fma(n, 2.12194440e-4, r)
    p = tl.fma(r, 1.98412698e-4, 1.38888889e-3)
    p = tl.fma(p, r, 8.33333333e-3)
    p = tl.fma(p, r, 4.16666667e-2)
    p = tl.fma(p, r, 1.66666667e-1)
    p = tl.fma(p, r, 0.5)
    return shifted.to(tl.int32, bitcast=True) << 23, tl.fma(r * r, p, r)


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, accurate near 0."""
    shift, tail = _exponential(tl.where(x < -80.0, -80.0, x))
    power = (shift + 0x3F800000).to(tl.float32, bitcast=True)
    return tl.fma(power, tail, power - 1.0)


@triton.jit
def _log_of(u, y):
    """log u for a positive normal u, whose distance from 1 is y."""
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
    """log(1 + y) for -1 < y <= 0, accurate near 0."""
    return _log_of(1.0 + y, y)


@triton.jit
def log(x):
    """The hardware's own is off by 2e-7 near 1, which a small divergence would show."""
    return tl.where((x > 0.0) & (x < float("inf")), _log_of(x, x - 1.0), tl.log(x))


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
    """From the products at `tile` + `offset` to logits; -inf, of probability 0, where masked."""
    z = tl.load(tile + offset, mask=mask, other=0.0)
    if bias is not None:
        z += tl.load(bias + entries, mask=mask, other=0.0)
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
def _normaliser(z, parts, part, stride):
    """MAX, SUM, MOMENT of one chunk."""
    most = tl.max(z, 0)
    below = z - tl.where(most == float("-inf"), 0.0, most)
    p = tl.exp(below)
    tl.store(parts + part, most)
    tl.store(parts + stride + part, tl.sum(p, 0))
    tl.store(parts + 2 * stride + part, -tl.sum(_product(p, below), 0))


@triton.jit
def _log_p(z, state, row, stride):
    """The maximum is subtracted by itself, exactly: z may be 1e4."""
    return (z - tl.load(state + row)) - log(tl.load(state + stride + row))


@triton.jit
def _entries(log_s, log_t, beta, KIND: tl.constexpr):
    """(S, term of the divergence's sum, pull); see `state.py`."""
    s = tl.exp(log_s)
    if KIND == FORWARD_KL:
        t = tl.exp(log_t)
        term = _product(t, log_t - log_s)
        pull = -t
    elif KIND == REVERSE_KL:
        term = _product(s, log_s - log_t)
        pull = term
    else:
        # log S - log M = -log(1 + b (e^d - 1)) with d = log T - log S: exactly 0 where S = T. For
        # d > 0 the roles swap, so that the exponential never overflows.
        t = tl.exp(log_t)
        d = log_t - log_s
        share = tl.where(d > 0.0, 1.0 - beta, beta)
        larger = -log1p(share * expm1(tl.where(d > 0.0, -d, d)))
        pull = (1.0 - beta) * _product(s, tl.where(d > 0.0, larger - d, larger))
        term = beta * _product(t, tl.where(d > 0.0, larger, larger + d)) + pull
    return s, term, pull


@triton.jit
def _clipped_pull(s, term, pull, threshold, KIND: tl.constexpr):
    if KIND == REVERSE_KL:
        pull += s  # d(s log s/t) = log s/t + 1: the constant vanishes from the unclipped sum only
    return tl.where(term > threshold, 0.0, pull)


@triton.jit
def _place(chunks, BLOCK: tl.constexpr):
    """(row, in 64 bits since row * stride passes 2^31, chunk, the chunk's entries)."""
    program = tl.program_id(0)
    chunk = program % chunks
    return (program // chunks).to(tl.int64), chunk, chunk * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def normalisers(
    student,
    teacher,
    bias,
    teacher_bias,
    parts,
    part_stride,
    v,
    chunks,
    student_stride,
    teacher_stride,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """parts [6, n, chunks]: of the student, then of the teacher where there is one."""
    row, _, entries = _place(chunks, BLOCK)
    mask, part = entries < v, tl.program_id(0)
    offset = row * student_stride + entries
    z = _logits(student, bias, offset, entries, mask, inner, outer, SOFTCAP)
    _normaliser(z, parts, part, part_stride)
    if teacher is not None:
        offset = row * teacher_stride + entries
        z_t = _logits(teacher, teacher_bias, offset, entries, mask, inner, outer, SOFTCAP)
        _normaliser(z_t, parts + 3 * part_stride, part, part_stride)


@triton.jit
def merge(parts, part_stride, chunks, state, state_stride, BLOCK: tl.constexpr):
    """A row's parts of a normaliser into the state. Grid: (rows, roles)."""
    row = tl.program_id(0)
    parts += 3 * tl.program_id(1) * part_stride + row * chunks
    state += 3 * tl.program_id(1) * state_stride + row
    chunk = tl.arange(0, BLOCK)
    mask = chunk < chunks
    old, most = tl.load(state), tl.load(parts + chunk, mask=mask, other=float("-inf"))
    new = tl.maximum(old, tl.max(most, 0))
    total = tl.load(parts + part_stride + chunk, mask=mask, other=0.0)
    moment = tl.load(parts + 2 * part_stride + chunk, mask=mask, other=0.0)
    old_total = tl.load(state + state_stride)
    old_moment = tl.load(state + 2 * state_stride)
    total, moment = _refer(most, total, moment, new)
    old_total, old_moment = _refer(old, old_total, old_moment, new)
    tl.store(state, new)
    tl.store(state + state_stride, old_total + tl.sum(total, 0))
    tl.store(state + 2 * state_stride, old_moment + tl.sum(moment, 0))


@triton.jit
def _refer(most, total, moment, new):
    """SUM and MOMENT under a larger maximum. Nothing seen, or only -inf: both are 0, and the
    difference of the maxima is no number.
    """
    shift = new - most
    factor = tl.exp(-shift)
    moment = tl.where(total == 0.0, 0.0, (moment + total * shift) * factor)
    return tl.where(total == 0.0, 0.0, total * factor), moment


@triton.jit
def add(parts, part_stride, chunks, state, state_stride, BLOCK: tl.constexpr):
    """A row's parts of plain sums onto the state's. Grid: (rows, sums)."""
    row = tl.program_id(0)
    chunk = tl.arange(0, BLOCK)
    place = parts + tl.program_id(1) * part_stride + row * chunks + chunk
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
    parts,
    part_stride,
    v,
    chunks,
    student_stride,
    teacher_stride,
    inner,
    outer,
    beta,
    threshold,
    KIND: tl.constexpr,
    CLIP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """parts [2 or, with the entry clip, 5, n, chunks] of DIVERGENCE, PULL, CLIPPED, COUNT and
    CLIPPED_PULL.
    """
    row, _, entries = _place(chunks, BLOCK)
    mask, part = entries < v, parts + tl.program_id(0)
    offset, offset_t = row * student_stride + entries, row * teacher_stride + entries
    z = _logits(student, bias, offset, entries, mask, inner, outer, SOFTCAP)
    z_t = _logits(teacher, teacher_bias, offset_t, entries, mask, inner, outer, SOFTCAP)
    log_s = _log_p(z, state, row, state_stride)
    log_t = _log_p(z_t, state + TEACHER * state_stride, row, state_stride)
    s, term, pull = _entries(log_s, log_t, beta, KIND)
    tl.store(part, tl.sum(term, 0))
    tl.store(part + part_stride, tl.sum(pull, 0))
    if CLIP:
        over = term > threshold
        clipped = _clipped_pull(s, term, pull, threshold, KIND)
        tl.store(part + 2 * part_stride, tl.sum(tl.where(over, threshold, term), 0))
        tl.store(part + 3 * part_stride, tl.sum(tl.where(over, 1.0, 0.0), 0))
        tl.store(part + 4 * part_stride, tl.sum(clipped, 0))


@triton.jit
def gradient(
    student,
    teacher,
    bias,
    teacher_bias,
    state,
    state_stride,
    row_weight,
    parts,
    part_stride,
    v,
    chunks,
    student_stride,
    teacher_stride,
    inner,
    outer,
    inverse,
    factor,
    beta,
    threshold,
    KIND: tl.constexpr,
    CLIP: tl.constexpr,
    SUMS_KNOWN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """In place; parts [1, n, chunks] of DOT with the entry clip, or [2, n, chunks] of DIVERGENCE
    and PULL where the sums are unknown.
    """
    row, _, entries = _place(chunks, BLOCK)
    mask, part = entries < v, parts + tl.program_id(0)
    offset, offset_t = row * student_stride + entries, row * teacher_stride + entries
    z = _logits(student, bias, offset, entries, mask, inner, outer, SOFTCAP)
    z_t = _logits(teacher, teacher_bias, offset_t, entries, mask, inner, outer, SOFTCAP)
    log_s = _log_p(z, state, row, state_stride)
    log_t = _log_p(z_t, state + TEACHER * state_stride, row, state_stride)
    s, term, pull = _entries(log_s, log_t, beta, KIND)
    if not SUMS_KNOWN:
        tl.store(part, tl.sum(term, 0))
        tl.store(part + part_stride, tl.sum(pull, 0))
    if row_weight is not None:
        scale = tl.load(row_weight + row) * factor * _through(z, inverse, SOFTCAP)
    if KIND == FORWARD_KL:
        g = s + pull
    elif SUMS_KNOWN:
        g = pull - s * tl.load(state + PULL * state_stride + row)
    else:
        g = pull
        tl.store(teacher + offset_t, s * scale, mask=mask)
    if CLIP:
        clipped = _clipped_pull(s, term, pull, threshold, KIND)
        clipped -= s * tl.load(state + CLIPPED_PULL * state_stride + row)
        tl.store(part, tl.sum(g * clipped, 0))
        g = clipped
    if row_weight is not None:
        tl.store(student + offset, g * scale, mask=mask)


@triton.jit
def target(
    logits, bias, targets, state, n, v, stride, inner, outer, SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds to `state` [n] the logit of each target that lies in this tile."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(targets + row, mask=row < n, other=-1)
    here = (index >= 0) & (index < v)
    z = _logits(logits, bias, row.to(tl.int64) * stride + index, index, here, inner, outer, SOFTCAP)
    tl.store(state + row, tl.load(state + row, mask=here, other=0.0) + z, mask=here)


@triton.jit
def log_prob_gradient(
    logits,
    bias,
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
    p = tl.exp(_log_p(z, state, row, state_stride))
    g = tl.where(entries == tl.load(targets + row), 1.0, 0.0) - p
    scale = tl.load(row_weight + row) * factor * _through(z, inverse, SOFTCAP)
    tl.store(logits + offset, g * scale, mask=mask)
