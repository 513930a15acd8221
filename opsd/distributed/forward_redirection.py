"""Calling a wrapped model to do something else than its own forward."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

Result = TypeVar("Result")


def called_through(wrapper: nn.Module, model: nn.Module, function: Callable[[], Result]) -> Result:
    """`function()`, as the forward of `model` in `wrapper`.

    DistributedDataParallel and FSDP2 do their work around the forward of what they wrap: they
    gather its weights and prepare to reduce its gradients. A function that uses the model's parts
    must run there. `wrapper` is `model` itself under FSDP2.
    """
    own = vars(model).get("forward")

    def restore() -> None:
        if own is None:
            vars(model).pop("forward", None)
        else:
            model.forward = own

    def forward() -> Result:
        restore()  # inside, the model is itself again
        return function()

    model.forward = forward
    try:
        return wrapper()
    finally:
        restore()
