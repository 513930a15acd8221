"""What the operators' backward have in common: gradients that forward computed are only scaled."""

from collections.abc import Sequence

import torch
from torch import Tensor


def scaled(saved: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Each of `saved` times `grad`, in its own dtype; empty ones stand for gradients nobody wants.

    In place where this graph will not be walked again: a copy of a [V, D] gradient would double the
    memory of the call. (A second walk, retain_graph=True, needs them as they are.)
    """
    once = type(grad) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()
    if once and grad.device.type == "cpu" and grad.numel() == 1 and grad.item() == 1.0:
        return list(saved)
    if once:
        return [x if x.numel() == 0 else x.mul_(grad) for x in saved]
    return [x if x.numel() == 0 else (x * grad).to(x.dtype) for x in saved]


def refuse_double_backward(grad: Tensor) -> None:
    """The derivative of the gradient is not implemented; unchecked, it would silently be 0."""
    if type(grad) is Tensor and torch.is_grad_enabled():
        raise RuntimeError(
            "opsd_kernels: create_graph=True is not supported: no second derivatives"
        )
