"""Mixtures of experts: which of their parts do not train, and whether they have a routers' loss."""

from typing import Any, cast

from transformers import PreTrainedModel

from opsd.common.errors import UserError
from opsd.models.head import ASKS
from opsd.models.lora import is_adapted
from opsd.models.routers import balance_of, routers


def untrained(model: PreTrainedModel, router_aux: float = 0.0) -> list[str]:
    """A sentence about each part of the model that does not train. router_aux: the weight of the
    routers' own loss."""
    found = []
    if frozen := getattr(model, "frozen_routers", 0):
        found.append(f"model.freeze_router: the {frozen} routers keep their weights, no adapters")
    if getattr(model, "asks_router_logits", False) and not frozen and not router_aux:
        found.append(
            f"The model's config.json says {ASKS}: its routers train by the run's loss alone, "
            "without the loss that evens them out (loss.router_aux)"
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


def check_router_loss(model: PreTrainedModel, weight: float) -> None:
    """Raise UserError if `loss.router_aux` has this weight and the model no such loss."""
    if weight and (balance_of(model) is None or not routers(model)):
        none = f"transformers computes no load-balancing loss for {type(model).__name__}"
        raise UserError(f"loss.router_aux is {weight:g}: {none}; leave it at 0")
