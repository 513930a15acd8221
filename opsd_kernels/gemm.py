"""The three matrix products of a linear head, whose logits are fp32 whatever the operands are.

bf16 logits near 20 have steps of 0.125, which makes wrong divergences: so the product is
accumulated *and kept* in fp32. On a GPU cuBLAS writes fp32 from bf16 operands. On the CPU torch
rounds a bf16 product to bf16: there the operands are widened, the weight one slice of the
vocabulary at a time, and for bf16 oneDNN is told that it may narrow fp32 operands to bf16. That is
exact for the widened ones, and rounds the gradient as any bf16 product would.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

# Vocabulary rows widened at a time: enough for a fast GEMM, few enough for the L3 cache.
SLICE = 1024


def tile_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and accumulated gradients for operands of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widens(x: Tensor) -> bool:
    """Whether operands of x's dtype and device are widened for a product."""
    return x.device.type == "cpu" and x.dtype != tile_dtype(x.dtype)


def narrows(x: Tensor) -> bool:
    """Whether a gradient is rounded to x's dtype before a product."""
    return x.device.type != "cpu" and x.dtype != tile_dtype(x.dtype)


def logits_(out_nv: Tensor, hidden_nd: Tensor, weight_vd: Tensor) -> None:
    """out = hidden W^T; `hidden` in fp32 where `widens(weight)`."""
    if widens(weight_vd):
        with _bf16_products(weight_vd.dtype):
            for rows, wide in _widened(weight_vd):
                torch.mm(hidden_nd, wide.t(), out=out_nv[:, rows])
    elif narrows(weight_vd):
        torch.mm(hidden_nd, weight_vd.t(), out_dtype=out_nv.dtype, out=out_nv)
    else:
        torch.mm(hidden_nd, weight_vd.t(), out=out_nv)


def add_input_gradient_(out_nd: Tensor, gradient_nv: Tensor, weight_vd: Tensor) -> None:
    """out += G W; `out` in fp32, G in the weight's dtype where `narrows(weight)`."""
    if widens(weight_vd):
        with _bf16_products(weight_vd.dtype):
            for rows, wide in _widened(weight_vd):
                out_nd.addmm_(gradient_nv[:, rows], wide)
    else:
        _add_product_(out_nd, gradient_nv, weight_vd)


def add_weight_gradient_(
    out_vd: Tensor, gradient_nv: Tensor, hidden_nd: Tensor, dtype: torch.dtype
) -> None:
    """out += G^T hidden; `out` is fp32, since small gradients would vanish in a bf16 sum over
    blocks. `dtype`: the operands' own.
    """
    with _bf16_products(dtype if out_vd.device.type == "cpu" else None):
        _add_product_(out_vd, gradient_nv.t(), hidden_nd)


def set_weight_gradient_(
    out_vd: Tensor, gradient_nv: Tensor, hidden_nd: Tensor, dtype: torch.dtype
) -> None:
    """out = G^T hidden, rounded once to out's dtype: where there is but one block."""
    if out_vd.dtype == hidden_nd.dtype:
        torch.mm(gradient_nv.t(), hidden_nd, out=out_vd)
        return
    with _bf16_products(dtype):
        for v in range(0, out_vd.shape[0], SLICE):
            out_vd[v : v + SLICE] = torch.mm(gradient_nv[:, v : v + SLICE].t(), hidden_nd)


def _widened(weight_vd: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """One slice after the other, in the same memory."""
    vocabulary, width = weight_vd.shape
    buffer = weight_vd.new_empty((min(SLICE, vocabulary), width), dtype=torch.float32)
    for v in range(0, vocabulary, SLICE):
        rows = slice(v, min(v + SLICE, vocabulary))
        yield rows, buffer[: rows.stop - v].copy_(weight_vd[rows])


def _add_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif _adds_to_fp32(out.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)


@functools.cache
def _adds_to_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of low precision to an fp32 matrix; some only multiply."""
    one = torch.ones((16, 16), dtype=dtype, device=device)
    wide = one.float()
    try:
        torch.addmm(wide, one, one, out_dtype=torch.float32, out=wide)
    except (RuntimeError, TypeError):  # a TypeError: meta tensors in torch 2.10
        return False
    return True


@contextlib.contextmanager
def _bf16_products(dtype: torch.dtype | None) -> Iterator[None]:
    """Within it, oneDNN's fp32 products may read their operands as bf16; only for `dtype` bf16, and
    on processors that multiply bf16. The setting is the process's: it is changed for the length of
    a product and put back.
    """
    if dtype != torch.bfloat16 or not _multiplies_bf16():
        yield
        return
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@functools.cache
def _multiplies_bf16() -> bool:
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return torch.backends.mkldnn.is_available() and any(
        getattr(torch.cpu, check, bool)() for check in checks
    )
