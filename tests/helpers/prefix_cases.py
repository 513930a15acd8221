"""Dense stand-ins for flash attention's varlen calls, with their arguments and conventions."""

import sys
import types
from functools import cache

import torch
from torch import Tensor


def _sequences(starts_q, starts_k):
    for i in range(len(starts_q) - 1):
        yield slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])


def _scores(q, k, scale, causal, left, right, softcap):
    """Scores [H, n, m], -inf where masked, and the slope of the cap; q, k: [n, H, d], [m, K, d]."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores, slope = scale * torch.einsum("ihd,jhd->hij", q, k), 1.0
    if softcap:
        slope = 1 - torch.tanh(scores / softcap).square()
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(len(q))[:, None] + len(k) - len(q)
    j = torch.arange(len(k))[None]
    hidden = torch.zeros(len(q), len(k), dtype=torch.bool)
    if causal:
        right = 0
    if right >= 0:
        hidden |= j > i + right
    if left >= 0:
        hidden |= j < i - left
    return scores.masked_fill(hidden, -torch.inf), slope


def _check(x, starts, longest):
    """Check what the library assumes: int32 starts of whole sequences, none too long."""
    assert starts.dtype == torch.int32 and starts[0] == 0 and starts[-1] == len(x)
    lengths = starts.diff()
    assert lengths.min() >= 0 and lengths.max() <= longest


def forward(q, k, v, starts_q, starts_k, longest_q, longest_k, causal, scale, left, right, softcap):
    """out [T, H, d] and log-sum-exp [H, T]: 0 and +inf for a query that sees no key."""
    _check(q, starts_q, longest_q)
    _check(k, starts_k, longest_k)
    if longest_q == 1:  # this means decoding, in which each sequence has a query
        assert len(q) == len(starts_q) - 1
    out, lse = torch.zeros_like(q), torch.full((q.shape[1], len(q)), torch.inf)
    for rows, keys in _sequences(starts_q.tolist(), starts_k.tolist()):
        scores, _ = _scores(q[rows], k[keys], scale, causal, left, right, softcap)
        sums = scores.logsumexp(-1)
        seen = sums > -torch.inf
        lse[:, rows] = torch.where(seen, sums, torch.inf).to(lse.dtype)
        p = torch.exp(scores - torch.where(seen, sums, torch.inf)[..., None])
        values = v[keys].repeat_interleave(q.shape[1] // v.shape[1], 1)
        out[rows] = torch.einsum("hij,jhd->ihd", p, values)
    return out, lse


def backward(
    d_out, q, k, v, out, lse, starts_q, starts_k, longest_q, longest_k, causal, scale, left, right,
    softcap,
):  # fmt: skip
    """The gradients, computed from the given out and log-sum-exp."""
    _check(q, starts_q, longest_q)
    _check(k, starts_k, longest_k)
    assert lse.is_contiguous() and lse.shape == (q.shape[1], len(q))
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    copies = q.shape[1] // k.shape[1]
    for rows, keys in _sequences(starts_q.tolist(), starts_k.tolist()):
        scores, slope = _scores(q[rows], k[keys], scale, causal, left, right, softcap)
        p = torch.exp(scores - lse[:, rows, None])
        wide_k, wide_v = (x[keys].repeat_interleave(copies, 1) for x in (k, v))
        d_p = torch.einsum("ihd,jhd->hij", d_out[rows], wide_v)
        sums = (d_out[rows] * out[rows]).sum(-1).T[..., None]
        d_scores = p * (d_p - sums) * slope * scale
        dq[rows] = torch.einsum("hij,jhd->ihd", d_scores, wide_k)
        for total, x, y in ((dk, d_scores, q), (dv, p, d_out)):
            wide = torch.einsum("hij,ihd->jhd", x, y[rows])
            total[keys] = wide.unflatten(1, (-1, copies)).sum(2)
    return dq, dk, dv


def register_torch_flash():
    """Register torch's own operators on the CPU, which lacks them; keep the result to keep them."""
    library = torch.library.Library("aten", "IMPL")

    def run_forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, debug, *,
        scale=None, window_size_left=None, window_size_right=None, **_,
    ):  # fmt: skip
        assert dropout_p == 0 and not debug
        out, lse = forward(
            query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, is_causal, scale,
            window_size_left, window_size_right, None,
        )  # fmt: skip
        nothing = torch.zeros(2, dtype=torch.uint64)
        return out, lse, nothing, nothing.clone(), torch.empty(0)

    def run_backward(
        grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p,
        is_causal, rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        assert dropout_p == 0
        return backward(
            grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k,
            is_causal, scale, window_size_left, window_size_right, None,
        )  # fmt: skip

    library.impl("_flash_attention_forward", run_forward, "CPU")
    library.impl("_flash_attention_backward", run_backward, "CPU")
    return library


def install_flash_attn(monkeypatch):
    """Install a package flash_attn with the two functions that 2.7 and later have."""

    package = types.ModuleType("flash_attn")
    package.flash_attn_interface = types.ModuleType("flash_attn.flash_attn_interface")
    for operator in flash_attn_operators():
        setattr(package.flash_attn_interface, operator._name, operator)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(
        sys.modules, "flash_attn.flash_attn_interface", package.flash_attn_interface
    )


@cache
def flash_attn_operators():
    """The package's functions, as torch operators whose Python signatures show no arguments."""

    @torch.library.custom_op("opsd_tests::_flash_attn_varlen_forward", mutates_args=("q", "k", "v"))
    def _flash_attn_varlen_forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool,
        window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
        alibi_slopes: Tensor | None = None, return_softmax: bool = False,
        block_table: Tensor | None = None, leftpad_k: Tensor | None = None,
        seqused_k: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        assert dropout_p == 0
        out, lse = forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale,
            window_size_left, window_size_right, softcap,
        )  # fmt: skip
        return out, lse, torch.empty(0), torch.zeros(2)

    @torch.library.custom_op(
        "opsd_tests::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv")
    )
    def _flash_attn_varlen_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
        dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
        softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
        softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
        rng_state: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        found = backward(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
            max_seqlen_k, causal, softmax_scale, window_size_left, window_size_right, softcap,
        )  # fmt: skip
        for target, x in zip((dq, dk, dv), found, strict=True):
            target.copy_(x)
        return torch.empty(0)

    return _flash_attn_varlen_forward, _flash_attn_varlen_backward
