"""LoRA: low-rank adapters beside frozen weights, made by peft.

An adapted layer computes W x + (alpha / rank) B A x; only A and B train. The `initial` teacher,
which has the weights of step 0, is the same model without its adapters: a second tree of modules
with the same tensors. So adapters are never switched on and off.

(LoRA: Hu et al., arXiv 2106.09685. QLoRA, frozen weights in 4 bits: Dettmers et al., 2305.14314.)
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from opsd.common.errors import UserError
from opsd.config.sections import ALL_LINEAR, LoraSection, ModelSection
from opsd.models.adapter_files import import_peft
from opsd.models.multimodal import other_linear_layers
from opsd.models.routers import routers

if TYPE_CHECKING:
    from peft import PeftModel


PLAIN = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The dtypes of weights that are not quantised."""


def is_adapted(model: nn.Module) -> bool:
    """Whether the model is peft's wrapper around a model with adapters."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def add_adapters(
    model: PreTrainedModel, section: ModelSection, base: Path | None = None
) -> PreTrainedModel:
    """Add new adapters to the model, in place. B is 0, so its outputs do not change.

    `base`: the directory that will hold the base model, if it is not `section.path`.

    Adapters are in fp32, like all weights that train. Raises UserError when `lora.targets` names no
    layer of the model, or its embedding or head: the loss reads the head's weight directly.
    """
    peft = import_peft()
    lora = section.lora
    targets = ALL_LINEAR if lora.targets == [ALL_LINEAR] else lora.targets
    path = Path(section.path) if base is None else base
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=sorted(without_adapter(model) | _inside_routers(model, section)) or None,
        task_type="CAUSAL_LM",
        revision=section.revision if base is None else None,
    )
    check_targets(model, lora)
    kept = routers(model).values() if section.freeze_router else ()
    frozen = {module for router in kept for module in router.modules()}
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"model.lora.targets is {lora.targets!r}: {error}") from None
    _leave_plain(adapted, frozen)
    # An absolute path, so that the saved adapter finds its model from any directory.
    adapted.peft_config["default"].base_model_name_or_path = (
        str(path.resolve()) if base or path.is_dir() else section.path
    )
    return cast(PreTrainedModel, adapted)  # it forwards all other attributes to the model


def _inside_routers(model: PreTrainedModel, section: ModelSection) -> set[str]:
    """The names of the routers' linear layers, if `model.freeze_router` keeps them as they are."""
    found = routers(model).items() if section.freeze_router else ()
    return {
        f"{name}.{inner}" if inner else name
        for name, router in found
        for inner, module in router.named_modules()
        if isinstance(module, nn.Linear)
    }


def _leave_plain(adapted: PeftModel, frozen: set[nn.Module]) -> None:
    """Remove the adapters which peft stands beside the routers' weights; it names these itself, and
    `exclude_modules` does not keep it from them."""
    config: Any = adapted.peft_config["default"]
    for name, module in list(adapted.named_modules()):
        if hasattr(module, "parameter_name") and module.base_layer in frozen:
            adapted.set_submodule(name, module.base_layer)
            own = {f"{name}.{weight}" for weight in module.base_layer._parameters}
            config.target_parameters = {
                target
                for target in config.target_parameters
                if not any(each.endswith(f".{target}") for each in own)
            }


def described_by(config: Any) -> dict[str, Any]:
    """The fields of model.lora that describe the same adapters as peft's `LoraConfig`.

    Raises UserError, which names the field, where model.lora cannot describe them.
    """
    peft = import_peft("peft_config")
    if type(config) is not peft.LoraConfig:
        raise UserError(f"peft_config is of type {type(config).__name__}: it must be a LoraConfig")
    ours = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    place = {"task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"}
    usual = peft.LoraConfig(target_modules=config.target_modules)
    for name, value in vars(config).items():
        if name not in {*ours, *place} and value != getattr(usual, name):
            raise UserError(f"peft_config.{name} is {value!r}: model.lora has no such field")
    targets = config.target_modules
    if targets is None or (isinstance(targets, str) and targets != ALL_LINEAR):
        mend = f"name the layers in a list, or say {ALL_LINEAR!r}"
        raise UserError(f"peft_config.target_modules is {targets!r}: {mend}")
    named = [targets] if isinstance(targets, str) else sorted(targets)
    return {"targets": named} | {field: getattr(config, name) for name, field in ours.items()}


def check_targets(model: PreTrainedModel, lora: LoraSection) -> None:
    """Raise UserError where `lora.targets` names a layer that cannot be adapted."""
    if lora.targets == [ALL_LINEAR]:
        return
    without, linear, ends = without_adapter(model), set(), set()
    for name, module in model.named_modules():
        if module in (model.get_output_embeddings(), model.get_input_embeddings()):
            ends.add(name.rpartition(".")[2])
        if is_linear(module) and name not in without:
            linear.add(name.rpartition(".")[2])
    for target in lora.targets:
        if target in ends:
            said = "the embedding and the output head take no adapter here"
            raise UserError(f"model.lora.targets has {target!r}: {said}")
        if target not in linear:
            known = ", ".join(sorted(linear - ends))
            raise UserError(f"model.lora.targets has {target!r}: this model has {known}")


def without_adapter(model: PreTrainedModel) -> set[str]:
    """The names of linear layers that must get no adapter: those not used for text, those that do
    not compute a plain product, and Mamba's out_proj, whose weight the kernels read directly."""
    modules = dict(model.named_modules())
    found = set(other_linear_layers(model))
    for name, module in modules.items():
        inside, _, last = name.rpartition(".")
        mamba = last == "out_proj" and {"A_log", "D"} <= modules[inside]._parameters.keys()
        if isinstance(module, nn.Linear) and (mamba or not is_linear(module)):
            found.add(name)
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can be added to the layer. It cannot to Llama 4's router or DeepSeek-V4's
    grouped projection, which inherit from torch's Linear but compute something else."""
    if not isinstance(module, nn.Linear):
        return type(module).__name__ == "Conv1D"
    if type(module).forward is nn.Linear.forward or module.weight.dtype not in PLAIN:
        return True
    try:
        with torch.no_grad():
            made = module(module.weight.new_zeros(2, module.in_features))
    except RuntimeError:
        return False
    return isinstance(made, torch.Tensor) and made.shape == (2, module.out_features)


def _inside(model: PreTrainedModel) -> PreTrainedModel:
    """The model inside peft's wrapper, with its adapters."""
    return cast(PreTrainedModel, cast("PeftModel", model).get_base_model())


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """A plain model with the same frozen weights; no weight is copied."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    def base(module: nn.Module) -> nn.Module:
        while isinstance(module, BaseTunerLayer):  # experts are wrapped once a tensor
            module = cast(nn.Module, module.base_layer)
        return module

    plain = shared_copy(_inside(model), module=base)
    vars(plain).pop("peft_config", None)  # peft sets it on the model that it adapts
    return plain.eval()


def additions(model: PreTrainedModel) -> dict[str, Callable[[], torch.Tensor]]:
    """For each adapted weight, by its name in the plain model: a function for alpha/rank · B A."""
    from peft.tuners.lora import LoraLayer

    return {
        f"{name.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}": partial(
            cast(Any, layer).get_delta_weight, "default"
        )
        for name, layer in _inside(model).named_modules()
        if isinstance(layer, LoraLayer)
    }


def largest_rank(model: nn.Module) -> int | None:
    """Of its adapters, where each stands beside a layer as peft's plain LoRA does; else None."""
    if not is_adapted(model):
        return None
    from peft.tuners.lora import LoraLayer

    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    if any(hasattr(layer, "parameter_name") for layer in layers):
        return None  # experts' adapters have another form in each engine
    return max(rank for layer in layers for rank in layer.r.values())


def save_adapters(model: PreTrainedModel, directory: Path) -> None:
    """Write the adapters alone, as peft reads them."""
    model.save_pretrained(str(directory), save_embedding_layers=False)


Module = TypeVar("Module", bound=nn.Module)


def shared_copy(
    root: Module,
    *,
    module: Callable[[nn.Module], nn.Module] = lambda module: module,
    parameter: Callable[[nn.Parameter], nn.Parameter] = lambda parameter: parameter,
) -> Module:
    """Copy the tree of modules; the copy uses the same tensors.

    Args:
        module: returns the replacement of a module.
        parameter: returns the replacement of a parameter; called once for a parameter used twice.
    """
    modules: dict[nn.Module, nn.Module] = {}
    parameters: dict[nn.Parameter, nn.Parameter] = {}

    def other(old: nn.Module) -> nn.Module:
        old = module(old)
        if old not in modules:
            new = modules[old] = copy.copy(old)
            for value in old._parameters.values():
                if value is not None and value not in parameters:
                    parameters[value] = parameter(value)
            new._parameters = {
                name: None if value is None else parameters[value]
                for name, value in old._parameters.items()
            }
            new._buffers = dict(old._buffers)
            for name, value in vars(old).items():
                if "_hooks" in name and isinstance(value, dict):
                    setattr(new, name, copy.copy(value))
            new._modules = {
                name: None if child is None else other(child)
                for name, child in old._modules.items()
            }
        return modules[old]

    return cast(Module, other(root))


def trainable(model: PreTrainedModel) -> float:
    """The trainable parameters' share of all parameters, 0 to 1."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains) / sum(n for n, _ in sizes)


def four_bits(dtype: torch.dtype) -> object:
    """transformers' config for QLoRA: NF4 weights with quantised scales, products in `dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
