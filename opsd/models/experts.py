"""Mixtures of experts: what of them does not train here, which is said when a run starts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from transformers import PreTrainedModel

from opsd.models.lora import is_adapted

ASKS = "output_router_logits"


def leave_router_loss(model: PreTrainedModel) -> None:
    """Ask the model for no router's loss: transformers cannot make one of single tokens. Mixtures
    are kept even by it while they are pretrained; after that it pulls away from the run's loss."""
    text = model.config.get_text_config()
    model.asks_router_logits = bool(getattr(text, ASKS, False))
    if model.asks_router_logits:
        setattr(text, ASKS, False)


@contextmanager
def asking_as_shipped(model: PreTrainedModel) -> Iterator[None]:
    """The model with what its config.json says of the router's loss, to be written."""
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
    """A line on each part that does not train."""
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
