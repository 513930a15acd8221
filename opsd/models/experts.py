"""Mixtures of experts: says at a run's start which of their parts do not train."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from transformers import PreTrainedModel

from opsd.models.lora import is_adapted

ASKS = "output_router_logits"


def leave_router_loss(model: PreTrainedModel) -> None:
    """Switch off the router's auxiliary loss, which transformers cannot compute from single tokens.
    It balances the experts in pretraining; later it would compete with the run's loss."""
    text = model.config.get_text_config()
    model.asks_router_logits = bool(getattr(text, ASKS, False))
    if model.asks_router_logits:
        setattr(text, ASKS, False)


@contextmanager
def asking_as_shipped(model: PreTrainedModel) -> Iterator[None]:
    """A context in which the config has the model's own `output_router_logits`, to save it."""
    text = model.config.get_text_config()
    asks = getattr(model, "asks_router_logits", False)
    if asks:
        setattr(text, ASKS, True)
    try:
        yield
    finally:
        if asks:
            setattr(text, ASKS, False)


def untrained(model: PreTrainedModel) -> list[str]:
    """A sentence about each part of the model that does not train."""
    found = []
    if getattr(model, "asks_router_logits", False):
        found.append(
            f"The model's config.json says {ASKS}: its routers train by the run's loss alone, "
            "without the loss that evens them out"
        )
    if is_adapted(model):
        modules = list(model.modules())
        adapted = {cast(Any, m).get_base_layer() for m in modules if hasattr(m, "parameter_name")}
        sizes = [
            sum(p.numel() for p in module.parameters(recurse=False) if p.ndim == 3)
            for module in modules
            if "Experts" in type(module).__name__ and module not in adapted
        ]
        if any(sizes):
            found.append(
                f"The adapters train none of the experts, {sum(sizes):,} of "
                f"{sum(p.numel() for p in model.parameters()):,} parameters: peft has none for "
                "this model's"
            )
    return found
