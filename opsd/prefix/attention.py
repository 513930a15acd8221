"""Attention over a packed stream, by the kernel that suits the tensors or that was asked for."""

import torch
from torch import Tensor

from opsd.prefix.choose_kernel import kernel_for
from opsd.prefix.layout import Layout


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of the stream's tokens to what each may see.

    Args:
        query: [T, H, d]; key: [N, K, d]; value: [N, K, d_v]; N is T and the layout's past, which
            comes first. Under autocast they are cast.
        scale: scores are scale · q · k.
        window: positions that a query sees, itself included; None: all before it.
        softcap: scores become softcap · tanh(score / softcap).

    Returns [T, H, d_v] in the dtype that was computed in.
    """
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    key, value = key.to(dtype), value.to(dtype)
    kernel = kernel_for(query, value, softcap is not None)
    with torch.autocast(kind, enabled=False):
        return kernel(query, key, value, layout, scale=scale, window=window, softcap=softcap)
