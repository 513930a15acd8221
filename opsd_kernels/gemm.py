"""The three matrix products of a linear head; logits are always fp32.

bf16 logits near 20 have steps of 0.125, which gives wrong divergences. So the product is
accumulated *and kept* in fp32. On a GPU cuBLAS writes fp32 from bf16 operands. On the CPU torch
rounds a bf16 product to bf16, so the operands are widened, the weight one slice of the vocabulary
at a time; and for bf16 oneDNN may narrow fp32 operands to bf16. That is exact for widened operands,
and rounds the gradient as any bf16 product would.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

# Vocabulary rows widened at a time: enough for a fast GEMM, few enough for the L3 cache.
SLICE = 1024


def tile_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and accumulated gradients for operands of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a gradient until backward has scaled it: fp32 for fp16, in whose range the
    factor 1/N of a mean (small ones vanish) and sums (large ones overflow) do not fit.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def gradient_unit(like: Tensor, row_weight: Tensor, by_product: float) -> Tensor | None:
    """A power of two that scales gradients by the products into fp16's range, before they are
    rounded to it as operands. None if no product rounds them to fp16.

    Their factors are row_weight [N] and `by_product`, the derivative of the logit by its product;
    the other factors are some 1e-8 to 1e3.
    """
    if like.dtype != torch.float16 or not narrows(like) or not row_weight.numel():
        return None
    largest = torch.where(row_weight.isfinite(), row_weight, 0.0).abs().max() * abs(by_product)
    _, exponent = torch.frexp(largest)
    # The largest becomes 8 to 16: the same as 1/N for N = 4096 to 8192 at a loss scale of 65 536.
    unit = torch.exp2((4 - exponent).clamp(-100, 100).to(row_weight.dtype))
    return torch.where(largest == 0, 1.0, unit)


def exact_operands(x: Tensor) -> bool:
    """Whether products read the gradient in fp32 or fp64."""
    return x.dtype in (torch.float32, torch.float64)


def widens(x: Tensor) -> bool:
    """Whether operands of x's dtype and device are widened to fp32 for a product."""
    return x.device.type == "cpu" and x.dtype != tile_dtype(x.dtype)


def narrows(x: Tensor) -> bool:
    """Whether a gradient is rounded to x's dtype before a product."""
    return x.device.type != "cpu" and x.dtype != tile_dtype(x.dtype)


def logits_(out_nv: Tensor, hidden_nd: Tensor, weight_vd: Tensor) -> None:
    """out = hidden W^T; `hidden` in fp32 where `widens(weight)`."""
    with _products(weight_vd, weight_vd.dtype):
        if widens(weight_vd):
            for rows, wide in _widened(weight_vd):
                torch.mm(hidden_nd, wide.t(), out=out_nv[:, rows])
        else:
            _set_product_(out_nv, hidden_nd, weight_vd.t())


def add_input_gradient_(out_nd: Tensor, gradient_nv: Tensor, weight_vd: Tensor) -> None:
    """out += G W; `out` in fp32, G in the weight's dtype where `narrows(weight)`."""
    with _products(weight_vd, weight_vd.dtype):
        if widens(weight_vd):
            for rows, wide in _widened(weight_vd):
                out_nd.addmm_(gradient_nv[:, rows], wide)
        else:
            _add_product_(out_nd, gradient_nv, weight_vd)


def add_weight_gradient_(
    out_vd: Tensor, gradient_nv: Tensor, hidden_nd: Tensor, dtype: torch.dtype
) -> None:
    """out += G^T hidden. `out` is fp32, since small gradients would vanish in a bf16 sum over
    blocks. `dtype`: the operands' original dtype.
    """
    with _products(out_vd, dtype):
        _add_product_(out_vd, gradient_nv.t(), hidden_nd)


def set_weight_gradient_(
    out_vd: Tensor, gradient_nv: Tensor, hidden_nd: Tensor, dtype: torch.dtype
) -> None:
    """out = G^T hidden, rounded once to out's dtype; for a single block."""
    with _products(out_vd, dtype):
        if out_vd.dtype in (hidden_nd.dtype, torch.float32):
            _set_product_(out_vd, gradient_nv.t(), hidden_nd)
            return
        for v in range(0, out_vd.shape[0], SLICE):
            out_vd[v : v + SLICE] = torch.mm(gradient_nv[:, v : v + SLICE].t(), hidden_nd)


def _widened(weight_vd: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Widen one slice after the other, in the same memory."""
    vocabulary, width = weight_vd.shape
    buffer = weight_vd.new_empty((min(SLICE, vocabulary), width), dtype=torch.float32)
    for v in range(0, vocabulary, SLICE):
        rows = slice(v, min(v + SLICE, vocabulary))
        yield rows, buffer[: rows.stop - v].copy_(weight_vd[rows])


def _set_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif _adds_to_fp32(out.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)


@functools.cache
def _adds_to_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch can add a product of low precision to an fp32 matrix; some only
    multiply.
    """
    one = torch.ones((16, 16), dtype=dtype, device=device)
    wide = one.float()
    try:
        torch.addmm(wide, one, one, out_dtype=torch.float32, out=wide)
    except (RuntimeError, TypeError):  # a TypeError: meta tensors in torch 2.10
        return False
    return True


class _ProductPrecision:
    """Sets oneDNN's precision of fp32 products, a setting of the whole process, during our
    products, and restores it after the last one. Threads whose products need another precision
    wait: otherwise an fp32 product could read its operands as bf16, and two threads could restore a
    wrong setting.
    """

    def __init__(self) -> None:
        self.free, self.users = threading.Condition(), 0
        self.current: str | None = None
        self.before = ""

    @contextlib.contextmanager
    def use(self, precision: str | None) -> Iterator[None]:
        """A context with this precision; None: the current one."""
        settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        with self.free:
            self.free.wait_for(lambda: self.users == 0 or self.current == precision)
            if self.users == 0:
                self.current, self.before = precision, settings.fp32_precision
                if precision is not None:
                    settings.fp32_precision = precision
            self.users += 1
        try:
            yield
        finally:
            with self.free:
                self.users -= 1
                if self.users == 0:
                    if precision is not None:
                        settings.fp32_precision = self.before
                    self.free.notify_all()


_precision = _ProductPrecision()


def _after_fork() -> None:
    """Reset after a fork: the threads that used the setting are not in the child."""
    global _precision
    if _precision.users and _precision.current is not None:
        torch.backends.mkldnn.matmul.fp32_precision = _precision.before  # type: ignore[attr-defined]
    _precision = _ProductPrecision()


os.register_at_fork(after_in_child=_after_fork)


def _products(where: Tensor, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """A context for products. On the CPU, oneDNN's fp32 products may read their operands as bf16
    inside it if `dtype` is bf16 and the processor multiplies bf16. In fp32 the process's setting
    applies.
    """
    if where.device.type != "cpu" or dtype == torch.float64 or not _multiplies_bf16():
        return contextlib.nullcontext()
    return _precision.use("bf16" if dtype == torch.bfloat16 else None)


@functools.cache
def _multiplies_bf16() -> bool:
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return torch.backends.mkldnn.is_available() and any(
        getattr(torch.cpu, check, bool)() for check in checks
    )
