"""The three matrix products of a linear head, whose logits are fp32 whatever the operands are.

bf16 logits near 20 have steps of 0.125, which makes wrong divergences: so the product is
accumulated *and kept* in fp32. On a GPU cuBLAS writes fp32 from bf16 operands. On the CPU torch
rounds a bf16 product to bf16: there the operands are widened, the weight one slice of the
vocabulary at a time.
"""

import torch
from torch import Tensor

# Vocabulary rows widened at a time: enough for a fast GEMM, few enough for the L3 cache.
SLICE = 2048


def tile_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and accumulated gradients for operands of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def slice_bytes(weight: Tensor) -> int:
    """What widening slices of `weight` costs, for the planner."""
    if weight.device.type != "cpu" or weight.dtype == tile_dtype(weight.dtype):
        return 0
    return min(SLICE, weight.shape[0]) * weight.shape[1] * 4


def logits_(out_nv: Tensor, hidden_nd: Tensor, weight_vd: Tensor) -> None:
    """out = hidden W^T."""
    if weight_vd.dtype == out_nv.dtype:
        torch.mm(hidden_nd, weight_vd.t(), out=out_nv)
    elif weight_vd.device.type == "cuda":
        torch.mm(hidden_nd, weight_vd.t(), out_dtype=out_nv.dtype, out=out_nv)
    else:
        hidden_nd = hidden_nd.to(out_nv.dtype)
        for v in range(0, weight_vd.shape[0], SLICE):
            wide = weight_vd[v : v + SLICE].to(out_nv.dtype)
            torch.mm(hidden_nd, wide.t(), out=out_nv[:, v : v + SLICE])


def input_gradient_(out_nd: Tensor, gradient_nv: Tensor, weight_vd: Tensor) -> None:
    """out = G W."""
    if weight_vd.dtype == gradient_nv.dtype:
        torch.mm(gradient_nv, weight_vd, out=out_nd)
    elif weight_vd.device.type == "cuda":
        torch.mm(gradient_nv.to(weight_vd.dtype), weight_vd, out_dtype=out_nd.dtype, out=out_nd)
    else:
        out_nd.zero_()
        for v in range(0, weight_vd.shape[0], SLICE):
            out_nd.addmm_(gradient_nv[:, v : v + SLICE], weight_vd[v : v + SLICE].to(out_nd.dtype))


def add_weight_gradient_(out_vd: Tensor, gradient_nv: Tensor, hidden_nd: Tensor) -> None:
    """out += G^T hidden; `out` is fp32, since small gradients would vanish in a bf16 sum over
    blocks.
    """
    if hidden_nd.dtype == out_vd.dtype or out_vd.device.type == "cpu":
        out_vd.addmm_(gradient_nv.t(), hidden_nd.to(out_vd.dtype))
    else:
        out_vd += torch.mm(gradient_nv.to(hidden_nd.dtype).t(), hidden_nd, out_dtype=out_vd.dtype)
