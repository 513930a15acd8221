"""A mixture of experts' routers: finds and freezes them, and computes the loss that evens them out.

That loss is transformers' own, on the routers' logits that the decoder returns where it is asked
for `output_router_logits`. Each token of a stream counts once.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from opsd.common.errors import UserError
from opsd.models.head import ASKS

BALANCE, ARGUMENTS = (
    "load_balancing_loss_func",
    ["gate_logits", "num_experts", "top_k", "attention_mask"],
)
"""transformers' function, which a module has for each model that uses it; its arguments."""


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that choose experts, and the gates of shared experts, by name."""
    modules = dict(model.named_modules())
    found = {}
    for name, module in modules.items():
        inside, _, last = name.rpartition(".")
        beside = [*modules.get(inside, nn.Module()).named_children()]
        experts = any("xpert" in each or "xpert" in type(m).__name__ for each, m in beside)
        # Not the gate of a gated layer, which stands beside no experts.
        if last == "router" or (last in ("gate", "shared_expert_gate") and experts):
            found[name] = module
    return found


def freeze_routers(model: Any) -> None:
    """Train none of the routers' weights. Raises UserError for a model without routers."""
    found = routers(model)
    if not found:
        raise UserError(f"model.freeze_router is true: {type(model).__name__} has no router")
    for router in found.values():
        router.requires_grad_(False)
    model.frozen_routers = len(found)


def leave_router_loss(model: Any) -> None:
    """Switch off the routers' loss in the model's own forward, which generates: transformers cannot
    compute it from single tokens."""
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


def balance_of(model: PreTrainedModel) -> Callable[..., Tensor] | None:
    """transformers' function for this model; None if it computes no such loss."""
    whole = getattr(model, "get_base_model", lambda: model)()
    found = getattr(sys.modules[type(whole).__module__], BALANCE, None)
    known = found is not None and list(inspect.signature(found).parameters) == ARGUMENTS
    return found if known else None


def router_loss(
    model: PreTrainedModel, logits: tuple[Tensor, ...], counted: Tensor | None
) -> Tensor:
    """transformers' load-balancing loss over the tokens that count, of all layers' logits."""
    text = model.config.get_text_config()
    most = getattr(model, "num_experts_per_tok", None) or text.num_experts_per_tok
    return balance_of(model)(logits, logits[0].shape[-1], most, counted)
