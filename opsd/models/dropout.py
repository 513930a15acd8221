"""Switches dropout off for scoring: the rollouts were sampled without it."""

from weakref import WeakSet

from torch import nn

_done: WeakSet[nn.Module] = WeakSet()


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to 0, for good. The training mode, which gradient
    checkpointing depends on, does not change."""
    if model in _done:
        return
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    _done.add(model)
