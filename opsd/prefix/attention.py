"""Computes attention over a packed stream, and chooses the kernel for it.

All kernels compute the same attention, without approximation. `tiles` runs everywhere, and the
others are tested against it.
"""

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from opsd.common.errors import UserError
from opsd.prefix import flash as varlen
from opsd.prefix import flex
from opsd.prefix.layout import Layout, Scores
from opsd.prefix.tiled import tiled_attention

Kernel = Callable[..., Tensor]
"""A function like `packed_attention`, with key and value already in the dtype to compute in."""

KERNELS: dict[str, Kernel] = {
    "tiles": tiled_attention,
    "flash": partial(varlen.flash_attention, calls=varlen.TORCH),
    "flash_3": partial(varlen.flash_attention, calls=varlen.TORCH),
    "flash_attn": partial(varlen.flash_attention, calls=varlen.FLASH_ATTN),
    "flex": flex.flex_packed_attention,
}
"""tiles: batched products, in this room. flash: torch's flash attention. flash_3: the same call
with FlashAttention 3's kernels. flash_attn: the flash-attn package. flex: FlexAttention."""

PREFERENCE = ("flash", "flash_attn", "flex", "tiles")
"""The order in which `auto` tries kernels on a GPU in bf16 and fp16; it never uses flash_3."""

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Inputs:
    """The properties of a call that decide which kernels can compute it."""

    device: torch.device
    dtype: torch.dtype
    head_width: int
    value_width: int
    softcap: bool
    sinks: bool = False


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scores: Scores
) -> Tensor:
    """Compute the attention of each token in the stream to the tokens it may see.

    Args:
        query: [T, H, d]; key: [N, K, d]; value: [N, K, d_v]. The N rows are those of the layout's
            past, then the stream's T. Under autocast they are cast.

    Returns [T, H, d_v] in the dtype of the computation.
    """
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    key, value = key.to(dtype), value.to(dtype)
    kernel = kernel_for(query, value, scores)
    with torch.autocast(kind, enabled=False):
        return kernel(query, key, value, layout, scores)


_asked = "auto"
_chosen: dict[Inputs, str] = {}
_by_tiles: list[Inputs] | None = None


def use_kernel(name: str) -> None:
    """Use the named kernel from now on, in this process. "auto" chooses one for each call.

    Raises UserError if it cannot run on this machine. Whether it suits the model is checked at the
    first call.
    """
    global _asked
    if name not in ("auto", *KERNELS):
        raise UserError(f"train.prefix_kernel is {name!r}: it may be auto, {', '.join(KERNELS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "auto" and (reason := missing(name, device)) is not None:
        raise UserError(f"train.prefix_kernel is {name!r}: {reason}")
    _asked = name
    _chosen.clear()


@contextmanager
def by_tiles() -> Iterator[list[Inputs]]:
    """A context in which `tiles` computes all calls; yields a list that collects their inputs."""
    global _by_tiles
    before, _by_tiles = _by_tiles, []
    try:
        yield _by_tiles
    finally:
        _by_tiles = before


def kernel_names(inputs: Sequence[Inputs], device: torch.device) -> list[str]:
    """The kernels for these inputs on `device`. Raises UserError as `kernel_for` does."""
    names = [choose(_asked, replace(each, device=device)) for each in inputs]
    return list(dict.fromkeys(names))


def kernel_for(query: Tensor, value: Tensor, scores: Scores) -> Kernel:
    """The kernel for a call with these tensors.

    Raises UserError if the kernel that was asked for cannot compute it.
    """
    widths, more = (query.shape[-1], value.shape[-1]), (scores.softcap, scores.sinks)
    inputs = Inputs(query.device, value.dtype, *widths, *(each is not None for each in more))
    if _by_tiles is not None:
        _by_tiles.append(inputs)
        return tiled_attention
    if inputs not in _chosen:
        _chosen[inputs] = choose(_asked, inputs)
    return KERNELS[_chosen[inputs]]


def choose(asked: str, inputs: Inputs) -> str:
    """The name of the kernel for these inputs."""
    if asked == "auto":
        on_gpu = inputs.device.type == "cuda" and inputs.dtype in HALF
        candidates = PREFERENCE if on_gpu else ("tiles",)
        return next(name for name in candidates if obstacle(name, inputs) is None)
    reason = obstacle(asked, inputs)
    if reason is not None:
        raise UserError(f"train.prefix_kernel is {asked!r}: {reason}; 'auto' finds one that can")
    if asked == "flash_3":
        _activate_flash_3()
    return asked


def obstacle(name: str, inputs: Inputs) -> str | None:
    """Why the named kernel cannot compute these inputs; None if it can."""
    reason = missing(name, inputs.device)
    if reason is not None or name == "tiles":
        return reason
    if inputs.sinks:
        return "this model's attention has sinks, which 'tiles' alone knows"
    if name == "flex":
        return None
    if inputs.dtype not in HALF:
        return f"flash attention computes in bf16 or fp16, not in {_plain(inputs.dtype)}"
    if inputs.head_width != inputs.value_width:
        return (
            f"this model's keys are {inputs.head_width} wide and its values "
            f"{inputs.value_width}; flash attention needs them alike"
        )
    if inputs.head_width % 8 or inputs.head_width > 256:
        return f"heads are {inputs.head_width} wide: they must be a multiple of 8, at most 256"
    if inputs.softcap and name != "flash_attn":
        return "this model caps its attention scores, which torch's flash attention cannot"
    return None


@cache
def missing(name: str, device: torch.device) -> str | None:
    """Why the named kernel cannot run on this machine's `device`; None if it can."""
    if name == "tiles":
        return None
    if device.type != "cuda":
        return "it needs a GPU"
    if name == "flex":
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if name == "flash_attn":
        return _unsuitable_flash_attn()
    if name == "flash_3":
        return _unsuitable_flash_3(device)
    return None


def _unsuitable_flash_attn() -> str | None:
    try:
        from flash_attn import flash_attn_interface
    except ImportError as error:
        return f"flash-attn is not installed, or not for this torch ({error})"
    for call, needs in varlen.FLASH_ATTN_ARGUMENTS.items():
        function = getattr(flash_attn_interface, call, None)
        if function is None or not needs <= _argument_names(function):
            return "this version of flash-attn is not known here: 2.7 to 2.8 are"
    return None


def _argument_names(function: Callable) -> set[str]:
    """The names of a function's arguments. Operators made by torch.library.custom_op, like
    flash-attn's, have the signature `(*args, **kwargs)` and list their arguments in a schema."""
    operator = getattr(function, "_opoverload", None)
    if operator is None:
        return set(inspect.signature(function).parameters)
    return {argument.name for argument in operator._schema.arguments}


def _unsuitable_flash_3(device: torch.device) -> str | None:
    attention = torch.nn.attention
    if "FA3" not in getattr(attention, "list_flash_attention_impls", list)():
        return f"torch {torch.__version__} cannot call FlashAttention 3"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return f"FlashAttention 3 is for Hopper, not for {torch.cuda.get_device_name(device)}"
    if importlib.util.find_spec("flash_attn_interface") is None:
        return "flash_attn_interface (FlashAttention 3) is not installed"
    return None


@cache
def _activate_flash_3() -> None:
    """Make torch's operator use FlashAttention 3, in this whole process."""
    torch.nn.attention.activate_flash_attention_impl("FA3")


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
