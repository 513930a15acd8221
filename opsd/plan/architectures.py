"""A model's architecture without its weights and without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from opsd.common.errors import UserError, in_short
from opsd.config.sections import ModelSection
from opsd.models.adapter_files import model_files
from opsd.models.weight_files import find_file

_QWEN3: dict[str, Any] = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
_QWEN3 |= {"max_position_embeddings": 40960, "rope_parameters": {"rope_theta": 1e6}}
_LLAMA3: dict[str, Any] = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
_SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")

_PUBLISHED: list[tuple[str, str, dict[str, Any], tuple[int, ...], dict[str, Any]]] = [
    ("Qwen3-0.6B", "qwen3", _QWEN3, (1024, 28, 16, 3072), {"tie_word_embeddings": True}),
    ("Qwen3-1.7B", "qwen3", _QWEN3, (2048, 28, 16, 6144), {"tie_word_embeddings": True}),
    ("Qwen3-4B", "qwen3", _QWEN3, (2560, 36, 32, 9728), {"tie_word_embeddings": True}),
    ("Qwen3-8B", "qwen3", _QWEN3, (4096, 36, 32, 12288), {}),
    ("Qwen3-14B", "qwen3", _QWEN3, (5120, 40, 40, 17408), {}),
    ("Qwen3-32B", "qwen3", _QWEN3, (5120, 64, 64, 25600), {}),
    ("Llama-3.2-1B", "llama", _LLAMA3, (2048, 16, 32, 8192), {"tie_word_embeddings": True}),
    ("Llama-3.2-3B", "llama", _LLAMA3, (3072, 28, 24, 8192), {"tie_word_embeddings": True}),
    ("Llama-3.1-8B", "llama", _LLAMA3, (4096, 32, 32, 14336), {}),
    ("Llama-3.3-70B", "llama", _LLAMA3, (8192, 80, 64, 28672), {}),
    ("SmolLM2-135M", "llama", _SMOLLM2, (576, 30, 9, 1536), {"num_key_value_heads": 3}),
    ("SmolLM2-360M", "llama", _SMOLLM2, (960, 32, 15, 2560), {"num_key_value_heads": 5}),
    ("SmolLM2-1.7B", "llama", _SMOLLM2, (2048, 24, 32, 8192), {"num_key_value_heads": 32}),
]

KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    name: (kind, {**common, **dict(zip(_SIZES, sizes, strict=True)), **more})
    for name, kind, common, sizes, more in _PUBLISHED
}
"""Published sizes of well-known models; -Instruct and -Base share theirs."""


def architecture(section: ModelSection, name: str = "model") -> PreTrainedConfig:
    """The configuration of a model directory, a config.json, a hub name in the local cache, or one
    of the KNOWN names; of an adapter, what it makes of its base. Raises UserError for anything
    else; nothing is ever downloaded.
    """
    files = model_files(section, name, offline=True)
    config = _base(files.base, files.where)
    for adapter in files.adapters:
        adapter.reshape(config)
    return config


def _base(section: ModelSection, where: str) -> PreTrainedConfig:
    path = Path(section.path)
    try:
        if section.gguf_file:
            return AutoConfig.from_pretrained(path, gguf_file=section.gguf_file)
        if path.is_file() or (path / "config.json").is_file():
            return AutoConfig.from_pretrained(path, trust_remote_code=section.trust_remote_code)
        if path.is_dir():
            raise UserError(f"{where}: a directory without config.json")
        cached = find_file(section.path, "config.json", section.revision, offline=True)
        if cached is not None:
            return AutoConfig.from_pretrained(cached, trust_remote_code=section.trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # a damaged file raises errors of any kind
        raise UserError(f"{where}: not a model's config ({in_short(error)})") from error
    found = _known(section.path)
    if found is None:
        raise UserError(
            f"{where}: neither a model directory nor a config.json nor in "
            f"the hub's local cache, and not one of those known here ({', '.join(KNOWN)})"
        )
    kind, facts = found
    return AutoConfig.for_model(kind, **facts)


def _known(path: str) -> tuple[str, dict] | None:
    name = path.rsplit("/", 1)[-1].lower()
    for suffix in ("-instruct", "-base", "-it"):
        name = name.removesuffix(suffix)
    return next((found for known, found in KNOWN.items() if known.lower() == name), None)
