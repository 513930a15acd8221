"""Read a model's architecture without its weights and without network access."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from opsd.common.errors import UserError, in_short
from opsd.common.near import near_model
from opsd.config.sections import ModelSection
from opsd.models.adapter_files import model_files
from opsd.models.directory_check import check_kernels
from opsd.models.weight_files import find_file
from opsd.plan.known_models import known_config


def architecture(section: ModelSection, name: str = "model") -> PreTrainedConfig:
    """The config of a model directory, a config.json, a hub name in the local cache, or a known
    name; for an adapter, its base model's config with the adapter's changes. Raises UserError."""
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
        found: Path | str | None = path
        if not path.is_file() and not (path / "config.json").is_file():
            if path.is_dir():
                raise UserError(f"{where}: a directory without config.json{near_model(path)}")
            found = find_file(section.path, "config.json", section.revision, offline=True)
        if found is not None:
            trust = section.trust_remote_code
            config = AutoConfig.from_pretrained(found, trust_remote_code=trust)
            config.get_text_config()  # raises if there are several, as in MusicGen
            check_kernels(config, where)
            return config
    except UserError:
        raise
    except Exception as error:  # a damaged file raises errors of any kind
        raise UserError(f"{where}: not a model's config ({in_short(error)})") from error
    return AutoConfig.for_model(**known_config(section.path, where))
