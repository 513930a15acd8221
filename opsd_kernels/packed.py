"""Linear layers by packed weights, in C++ (csrc/product.cpp), for decoding on a CPU."""

import ctypes
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import Tensor, nn

from opsd_kernels.tiles import cpp

INTERFACE, PANEL = 2, 48  # OPSD_PRODUCT_INTERFACE and OPSD_PANEL of csrc/product.h


class _Product(ctypes.Structure):
    """`struct opsd_product`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input", "weight", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "outputs", "inputs")),
        ("bf16", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


@functools.cache
def _kernels() -> tuple:
    """The library's functions `pack` and `product`; none if there is no library, or an older one,
    or vectors are so short that torch is faster."""
    if cpp.unusable_because() is not None or cpp.instruction_set() == "baseline":
        return ()
    library = cpp._library()
    interface = getattr(library, "opsd_product_interface", None)
    if interface is None or interface() != INTERFACE:
        return ()
    found = (library.opsd_pack, library.opsd_product)
    for function in found:
        function.argtypes, function.restype = [ctypes.POINTER(_Product)], None
    return found


def packable(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `packed_weights` takes the layer."""
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and type(layer.weight.data) is Tensor  # not split over processes
        and layer.weight.dtype in (torch.float32, torch.bfloat16)
        and layer.weight.device.type == "cpu"
        and layer.weight.is_contiguous()
        and layer.out_features > 0 < layer.in_features
        and (layer.weight.dtype == torch.float32 or layer.in_features % 2 == 0)
        and bool(_kernels())
    )


@contextmanager
def packed_weights(layers: Iterable[nn.Linear]) -> Iterator[None]:
    """While it lasts, these layers run in C++, where there is no gradient, with sums in fp32. Their
    weights are copied at its start."""
    layers = list(layers)
    for layer in layers:
        vars(layer)["forward"] = Packed(layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


class Packed:
    """A linear layer's forward: [..., inputs] to [..., outputs], both in the weight's dtype."""

    def __init__(self, layer: nn.Linear):
        weight, bias = layer.weight.detach(), layer.bias
        self.layer, (self.outputs, self.inputs) = layer, weight.shape
        self.bias = None if bias is None else bias.detach().to(weight.dtype).contiguous()
        self.weight = weight.new_empty(-(-self.outputs // PANEL) * PANEL, self.inputs)
        self._run(0, None, weight, self.weight)

    def _run(self, function: int, given: Tensor | None, weight: Tensor, out: Tensor) -> None:
        tensors = (given, weight, self.bias, out)
        _kernels()[function](
            _Product(
                *(None if x is None else x.data_ptr() for x in tensors),
                *(out.numel() // self.outputs, self.outputs, self.inputs),
                weight.dtype == torch.bfloat16,
                torch.get_num_threads(),
            )
        )

    def __call__(self, x: Tensor) -> Tensor:
        graph = torch.is_grad_enabled() or torch.compiler.is_compiling()
        ours = type(x) is Tensor and x.dtype == self.weight.dtype and x.device.type == "cpu"
        fits = x.dim() > 0 and x.shape[-1] == self.inputs
        if graph or not (ours and fits) or torch.is_autocast_enabled("cpu"):
            return nn.Linear.forward(self.layer, x)
        out = x.new_empty(*x.shape[:-1], self.outputs)
        self._run(1, x.float().contiguous(), self.weight, out)
        return out
