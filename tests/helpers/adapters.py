"""Adapters in the forms that users have, made by peft itself: each family's files and logits.

`wanted` is computed by peft's own model before it is saved, without any of our code.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opsd.quickstart import tiny_model as tiny

IDS = torch.tensor([[5, 9, 6, 21, 7, 8, 20, 11, 12]])
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
ATTENTION = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Family:
    """One form of adapter.

    Attributes:
        config: makes peft's config.
        base: fields of the model's config beside SHAPE; `kind: llama` for a Llama, else a Qwen3.
        tokens: added to the adapter's own tokenizer, for which the embedding is resized.
        template: the adapter's own chat template.
        change: changes the files afterwards.
        refused: a part of the error line, if the adapter cannot be loaded.
    """

    config: Callable[[], peft.PeftConfig]
    base: dict = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    template: str | None = None
    change: Callable[[Path], None] = lambda directory: None
    refused: str | None = None


def lora(**values) -> Callable[[], peft.PeftConfig]:
    """Returns a function that makes a LoRA config: by default of rank 4 on the attention."""
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"}
    return lambda: peft.LoraConfig(**defaults | values)


def other(kind: str, **values) -> Callable[[], peft.PeftConfig]:
    """Returns a function that makes a config of another peft type."""
    return lambda: getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **values)


def edited(**values) -> Callable[[Path], None]:
    """Returns a change that sets fields of adapter_config.json."""

    def change(directory: Path) -> None:
        file = directory / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def without(part: str) -> Callable[[Path], None]:
    """Returns a change that removes the tensors with `part` in their names."""

    def change(directory: Path) -> None:
        from safetensors.torch import load_file, save_file

        file = directory / "adapter_model.safetensors"
        state = {name: tensor for name, tensor in load_file(file).items() if part not in name}
        save_file(state, file, metadata={"format": "pt"})

    return change


def pickled(directory: Path) -> None:
    """Replace the weights file by a pickle."""
    from safetensors.torch import load_file

    file = directory / "adapter_model.safetensors"
    torch.save(load_file(file), directory / "adapter_model.bin")
    file.unlink()


UNTIED = {"tie_word_embeddings": False}
BOTH_ENDS = ["embed_tokens", "lm_head"]
STEPS = ("<step>", "</step>")
FAMILIES = {
    "plain": Family(lora()),
    "all linear, Llama": Family(lora(target_modules="all-linear"), {"kind": "llama"}),
    "own template": Family(lora(), template="{{ messages[0]['content'] }}:"),
    "rank and alpha patterns": Family(
        lora(
            target_modules="all-linear",
            rank_pattern={"q_proj": 2, r".*layers\.1\.mlp\.up_proj": 6},
            alpha_pattern={"q_proj": 32},
        )
    ),
    "rsLoRA": Family(lora(use_rslora=True)),
    "DoRA": Family(lora(use_dora=True)),
    "biases": Family(lora(bias="all"), {"kind": "llama", "attention_bias": True}),
    "one layer, by a pattern": Family(
        lora(target_modules=r".*layers\.1\..*(q|k)_proj", exclude_modules=r".*k_proj")
    ),
    "layers_to_transform": Family(lora(layers_to_transform=[1])),
    "PiSSA": Family(lora(init_lora_weights="pissa")),
    "replicated layers": Family(lora(layer_replication=[(0, 2), (1, 2)]), {"kind": "llama"}),
    "tied head": Family(lora(target_modules=["q_proj", "lm_head"])),
    "tied embedding": Family(lora(target_modules=["q_proj", "embed_tokens"])),
    "tied, both ends": Family(lora(target_modules=["q_proj", *BOTH_ENDS])),
    "tied, kept tied": Family(
        lora(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    ),
    "untied head": Family(lora(target_modules=["q_proj", "lm_head"]), UNTIED),
    "saved head, tied": Family(lora(modules_to_save=["lm_head"])),
    "saved embedding, tied": Family(lora(modules_to_save=["embed_tokens"])),
    "saved ends, tied": Family(lora(modules_to_save=BOTH_ENDS)),
    "saved ends, kept tied": Family(
        lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    ),
    "saved ends": Family(lora(modules_to_save=BOTH_ENDS), UNTIED),
    "saved norm": Family(lora(modules_to_save=["norm"])),
    "tokens": Family(lora(trainable_token_indices=[5, 7]), UNTIED),
    "tokens, tied": Family(lora(trainable_token_indices={"embed_tokens": [5, 7]})),
    "resized": Family(lora(), UNTIED, STEPS),
    "resized, tied": Family(lora(), {}, STEPS),
    "resized, saved ends": Family(lora(modules_to_save=BOTH_ENDS), UNTIED, STEPS),
    "resized, tied, LoRA on the embedding": Family(
        lora(target_modules=["q_proj", "embed_tokens"]), {}, STEPS
    ),
    "resized, trained tokens": Family(lora(trainable_token_indices=[5, 28]), {}, STEPS),
    "a newer peft": Family(
        lora(), change=edited(peft_version="99.0", later_option=None, later_flag=False, more={})
    ),
    "IA3": Family(
        other("IA3", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    ),
    "LoHa": Family(other("LoHa", r=4, target_modules=ATTENTION)),
    "LoKr": Family(other("LoKr", r=4, target_modules=ATTENTION)),
    "OFT": Family(other("OFT", oft_block_size=4, target_modules=ATTENTION)),
    "VeRA": Family(other("Vera", r=4, target_modules=["q_proj"])),
    "trainable tokens alone": Family(other("TrainableTokens", token_indices=[5, 6])),
    "norms": Family(other("LNTuning", target_modules=["norm"])),
}
"""What loads."""

REFUSED = {
    "biases of the adapters": Family(
        lora(lora_bias=True), refused="Impossible to merge LoRA with `lora_bias=True`"
    ),
    "activated LoRA": Family(lora(alora_invocation_tokens=[5]), refused="type activated LoRA"),
    "prompt tuning": Family(other("PromptTuning", num_virtual_tokens=2), refused="PROMPT_TUNING"),
    "prefix tuning": Family(other("PrefixTuning", num_virtual_tokens=2), refused="PREFIX_TUNING"),
    "PiSSA by chance": Family(
        lora(init_lora_weights="pissa_niter_4"),
        refused="at random, so nobody can load it again",
    ),
    "pickle": Family(lora(), change=pickled, refused="no weights as safetensors"),
    "a later option": Family(lora(), change=edited(warp=1), refused="has 'warp', which peft"),
    "a later type": Family(
        lora(), change=edited(peft_type="LORA9"), refused="peft_type is 'LORA9'"
    ),
    "another task": Family(
        lora(), change=edited(task_type="SEQ_CLS"), refused="task_type is 'SEQ_"
    ),
    "no base": Family(
        lora(), change=edited(base_model_name_or_path=None), refused="does not say which model"
    ),
    "base missing": Family(
        lora(), change=edited(base_model_name_or_path="nobody/nothing"), refused="'nobody/nothing'"
    ),
    "base elsewhere": Family(
        lora(),
        change=edited(base_model_name_or_path="/home/alice/models/base"),
        refused="the base_model_name_or_path in its adapter_config.json can be changed",
    ),
    "of itself": Family(
        lora(),
        change=lambda adapter: edited(base_model_name_or_path=str(adapter))(adapter),
        refused="is an adapter of itself",
    ),
    "a tensor lost": Family(lora(), change=without("1.self_attn.q_proj.lora_B"), refused="q_proj"),
    "tensors of other layers": Family(
        lora(target_modules=["q_proj", "o_proj"]),
        change=edited(target_modules=["q_proj"]),
        refused="o_proj",
    ),
    "rank of another": Family(lora(), change=edited(r=8), refused="size mismatch"),
}
"""What is one line instead."""


def make_base(directory: Path, **values) -> PreTrainedModel:
    """Save a tiny random model with its character tokenizer."""
    torch.manual_seed(3)
    tokenizer = tiny.make_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    values = {"vocab_size": len(tokenizer), "tie_word_embeddings": True} | SHAPE | ids | values
    if values.pop("kind", None) == "llama":
        model = LlamaForCausalLM(LlamaConfig(**values))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(head_dim=8, **values))
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.ndim == 2 else 1  # for logits that differ between models
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model.eval()


def make_adapter(family: Family, place: Path, base: Path | None = None) -> torch.Tensor:
    """Save the family's files: `place`/base, unless a base is given, and `place`/adapter.

    Returns peft's logits of IDS.
    """
    if base is None:
        base = place / "base"
        make_base(base, **family.base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapter = place / "adapter"
    if family.tokens or family.template is not None:
        tokenizer = tiny.make_tokenizer()
        tokenizer.add_tokens(list(family.tokens), special_tokens=True)
        tokenizer.chat_template = family.template or tokenizer.chat_template
        tokenizer.save_pretrained(adapter)
        if family.tokens:
            model.resize_token_embeddings(len(tokenizer))
    return adapt(model, family, adapter, base)


def adapt(model: PreTrainedModel, family: Family, adapter: Path, base: Path) -> torch.Tensor:
    """Adapt the model and save the adapter with the name of its base; returns the logits of IDS."""
    adapted = peft.get_peft_model(model, family.config())
    draw = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(adapter)
    family.change(adapter)
    if family.refused is not None:
        return torch.empty(0)
    with torch.no_grad():
        return adapted.eval()(IDS).logits


def in_hub_cache(directory: Path, cache: Path, name: str) -> None:
    """Copy a model's files into a hub cache, as a download of `name` would."""
    commit = "0" * 40
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(directory, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
