"""Adds a peft adapter to its model's weights."""

import json
import re
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from opsd.common.errors import UserError, in_short
from opsd.common.strict_json import texts
from opsd.common.workers import Ended, Workers
from opsd.models.adapter_files import WEIGHTS, Adapter, import_peft
from opsd.models.weight_files import check_numbers


def merge_adapter(model: PreTrainedModel, adapter: Adapter, name: str) -> PreTrainedModel:
    """Add the adapter to the model's weights, in place. Raises UserError, which calls the config's
    section `name`."""
    peft = import_peft("an adapter")
    where = f"{name}.path: the adapter in {adapter.section.path!r}"
    directory, file = str(adapter.directory), adapter.directory / WEIGHTS
    try:
        weights = {name: tensor.float() for name, tensor in load_file(file).items()}
        check_numbers(weights.items(), adapter.tensors, where, str(file))
        _check_patterns(adapter.config, model, where)
        if adapter.rows is not None and adapter.rows != model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(adapter.rows, mean_resizing=False)  # it has the new rows
        tied = model.config.tie_word_embeddings
        config = peft.PeftConfig.from_pretrained(directory)
        config.inference_mode = True
        adapted = peft.PeftModelForCausalLM(model, config)
        found = adapted.load_adapter(directory, "default")
        unshare(adapted)
        merged = adapted.merge_and_unload()
    except UserError:
        raise
    except Exception as error:  # damaged files raise any type
        raise UserError(f"{where} cannot be added to its model: {in_short(error)}") from error
    # With a resized embedding, peft saves some tensors that it does not load.
    left = [
        n for n in found.unexpected_keys if ".lora_" in n or any(map(str.isdigit, n.split(".")))
    ]
    if lost := [*found.missing_keys, *left]:
        raise UserError(f"{where} does not fit its model: {lost[0]} is in only one of the two")
    ends = merged.get_input_embeddings(), merged.get_output_embeddings()
    if tied and torch.equal(ends[0].weight, ends[1].weight):
        merged.config.tie_word_embeddings = True
        merged.tie_weights()
    return merged.requires_grad_(True)  # peft has frozen it


def _check_patterns(config: dict[str, Any], model: nn.Module, where: str) -> None:
    """Raise UserError if one of the config's patterns takes too long on the modules' names."""
    patterns = sorted({text for text in texts(config) if re.search(r"[*+?{|]", text)})
    if not patterns:
        return
    names = [name for name, _ in model.named_modules()]
    workers = Workers("opsd.models.pattern_worker", seconds=2.0, memory=1 << 28)
    try:
        (reply,) = workers.answers([json.dumps([patterns, names]).encode()])
    finally:
        workers.close()
    if isinstance(reply, Ended):
        said = ", ".join(map(repr, patterns))[:200]
        raise UserError(f"{where} has patterns that take too much to match ({reply.why}): {said}")


def unshare(model: nn.Module) -> None:
    """Give each module parameters of its own. Otherwise, what is added to a tied head would be
    added to the embedding as well."""
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter in seen:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), False)
            seen.add(parameter)
