"""Attention of single tokens in C++ (csrc/attention.cpp), in the place of torch's, for decoding."""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from opsd_kernels.tiles import cpp

INTERFACE = 1  # OPSD_ATTENTION_INTERFACE of csrc/attention.h
MOST_ROWS, MOST_WIDTH, VECTOR = 64, 512, 16  # of the rows and widths that `_serves` accepts
TORCH = functional.scaled_dot_product_attention


class _Attention(ctypes.Structure):
    """`struct opsd_attention`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "allowed", "out")),
        *((name, ctypes.c_int64) for name in ("sequences", "groups", "rows", "tokens")),
        *((name, ctypes.c_int64) for name in ("width", "value_width")),
        *((name, ctypes.c_int64 * 3) for name in ("key_strides", "value_strides")),
        ("allowed_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("bf16", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


@functools.cache
def _kernel():
    """The library's function; None if there is no library, or an older one."""
    if cpp.unusable_because() is not None:
        return None
    library = cpp._library()
    interface = getattr(library, "opsd_attention_interface", None)
    if interface is None or interface() != INTERFACE:
        return None
    function = library.opsd_attention_rows
    function.argtypes, function.restype = [ctypes.POINTER(_Attention)], None
    return function


@contextmanager
def single_tokens() -> Iterator[None]:
    """While it lasts, torch's `scaled_dot_product_attention` of single tokens on a CPU runs here,
    without a gradient. All other calls run as before."""
    found = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = found


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale query keyᵀ) value, where the mask allows it: torch's function, with sums in
    fp32. A row that may see nothing is 0.

    Args:
        query: [B, H, R, d]; key: [B, K, T, d]; value: [B, K, T, d_v].
        attn_mask: as torch's. Ours takes a boolean one [B or 1, 1, 1, T].

    Returns [B, H, R, d_v].
    """
    graph = torch.is_grad_enabled() or torch.compiler.is_compiling()
    plain = not (dropout_p or is_causal or graph)
    same_heads = query.shape[1:2] == key.shape[1:2]
    if not (plain and (enable_gqa or same_heads) and _serves(query, key, value, attn_mask)):
        return TORCH(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    sequences, groups, tokens, width = key.shape
    query = query.contiguous()
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    strides = 0
    if attn_mask is not None:
        strides = attn_mask.stride(0) if len(attn_mask) > 1 else 0
    _kernel()(
        _Attention(
            *(x.data_ptr() for x in (query, key, value)),
            None if attn_mask is None else attn_mask.data_ptr(),
            out.data_ptr(),
            *(sequences, groups, query.shape[1] // groups * query.shape[2], tokens),
            *(width, value.shape[-1], key.stride()[:3], value.stride()[:3], strides),
            width**-0.5 if scale is None else scale,
            query.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
    )
    return out


def _serves(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the library computes this call's attention."""
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    if any(type(x) is not Tensor or x.device.type != "cpu" or x.dim() != 4 for x in tensors):
        return False
    batch, heads, rows, width = query.shape
    groups, tokens, value_width = value.shape[1:]
    return (
        query.dtype in (torch.float32, torch.bfloat16)
        and query.dtype == key.dtype == value.dtype
        and not torch.is_autocast_enabled("cpu")
        and key.shape == (batch, groups, tokens, width)
        and len(value) == batch
        and not any(n % VECTOR or not 0 < n <= MOST_WIDTH for n in (width, value_width))
        and key.stride(-1) == value.stride(-1) == 1
        and 0 < tokens
        and groups > 0 == heads % groups
        and 0 < heads // groups * rows <= MOST_ROWS
        and (mask is None or _is_padding(mask, batch, tokens))
        and _kernel() is not None
    )


def _is_padding(mask: Tensor, batch: int, tokens: int) -> bool:
    """Whether a mask says which tokens each sequence sees, the same ones for all its rows."""
    return (
        mask.dtype == torch.bool
        and mask.shape[0] in (1, batch)
        and mask.shape[1:] == (1, 1, tokens)
        and (tokens == 1 or mask.stride(-1) == 1)
    )
