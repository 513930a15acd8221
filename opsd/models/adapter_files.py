"""Finds the files of a model: its base, and the peft adapters that are added to it one after the
other. A path is an adapter where it has an adapter_config.json, in a directory or on the hub."""

import dataclasses
import inspect
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from opsd.common.errors import UserError
from opsd.common.hub_offline import before_asking_hub
from opsd.common.strict_json import read_object
from opsd.config.sections import ModelSection
from opsd.models.directory_check import check_files
from opsd.models.weight_files import Stored, find_file, header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TOKENIZER = """
    tokenizer_config.json tokenizer.json tokenizer.model vocab.json merges.txt
    special_tokens_map.json added_tokens.json chat_template.jinja
""".split()


@dataclass(frozen=True)
class Adapter:
    """An adapter's files: the config section that names them, their directory, and their config."""

    section: ModelSection
    directory: Path
    config: dict[str, Any]

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """The tensors of its weights file, by name."""
        return header(self.directory / WEIGHTS, f"the adapter in {self.section.path!r}")

    @cached_property
    def _ends(self) -> dict[str, Stored]:
        """Its tensors of no block, such as embedding and head: blocks' names have numbers."""
        tensors = self.tensors.items()
        return {name: t for name, t in tensors if not any(map(str.isdigit, name.split(".")))}

    @property
    def rows(self) -> int | None:
        """The number of rows of its own embedding; None where it has no embedding."""
        rows = [
            tensor.shape[0]
            for name, tensor in self._ends.items()
            if name.endswith(".weight") and ".lora_" not in name and len(tensor.shape) == 2
        ]
        return rows[0] if rows else None

    def reshape(self, config: PreTrainedConfig) -> None:
        """Give a base's config this adapter's vocabulary size and layers. Untie the head from the
        embedding where the adapter changes only one of them."""
        text = config.get_text_config()
        if repeated := self.config.get("layer_replication"):
            try:
                text.num_hidden_layers = sum(end - start for start, end in repeated)
            except (TypeError, ValueError):
                said = f"{str(self.directory / CONFIG)!r} has layer_replication {repeated!r}"
                raise UserError(f"{said}: it must list pairs of layers' numbers") from None
        text.vocab_size = self.rows or text.vocab_size
        lists = [self.config.get(name) for name in ("modules_to_save", "target_modules")]
        named = {name for names in lists if isinstance(names, list) for name in map(str, names)}
        changed = [
            n for n, t in self._ends.items() if len(t.shape) == 2 and named & {*n.split(".")}
        ]
        if changed and not self.config.get("ensure_weight_tying"):
            text.tie_word_embeddings = config.tie_word_embeddings = False


@dataclass(frozen=True)
class ModelFiles:
    """A base model and its adapters, in the order in which they are added."""

    base: ModelSection
    adapters: tuple[Adapter, ...]
    name: str

    @property
    def where(self) -> str:
        """The first words of an error message about the base."""
        if not self.adapters:
            return f"{self.name}.path is {self.base.path!r}".replace("MODEL.path", "MODEL")
        path = self.adapters[-1].section.path
        return f"{self.name}.path is {path!r}, an adapter of {self.base.path!r}"

    def owner(self, *names: str) -> ModelSection:
        """The section of the last adapter that has a file of one of these names, or else of the
        base. An adapter's section then names its directory: by a hub name, transformers would look
        for config.json."""
        for adapter in reversed(self.adapters):
            section = adapter.section
            found = [find_file(section.path, name, section.revision) for name in names]
            if any(found):
                return section.model_copy(update={"path": str(adapter.directory), "revision": None})
        return self.base


def model_files(section: ModelSection, name: str = "model", offline: bool = False) -> ModelFiles:
    """Follow `path` through its adapters to the base; with `offline`, on this machine only. Raises
    UserError, which calls the config's section `name`, for an adapter that cannot be added to it.
    """
    adapters: list[Adapter] = []
    seen = set()
    where = f"{name}.path is {section.path!r}"
    while (config := _adapter_config(section, where, offline)) is not None:
        if adapters:
            where = f"{name}.path is {adapters[0].section.path!r}: {section.path!r}"
        _check(config, where)
        directory = Path(section.path).resolve()
        key = str(directory) if directory.is_dir() else (section.path, section.revision)
        if key in seen:
            raise UserError(f"{where} is an adapter of itself, and there is no model under it")
        seen.add(key)
        weights = find_file(section.path, WEIGHTS, section.revision, offline)
        if weights is None:  # peft would load a pickle instead
            raise UserError(f"{where}: the adapter has no weights as safetensors ({WEIGHTS})")
        adapters.insert(0, Adapter(section, weights.parent, config))
        base = {"path": config["base_model_name_or_path"], "revision": config.get("revision")}
        section = section.model_copy(update=base)
    files = ModelFiles(section, tuple(adapters), name)
    for part in (section, *(adapter.section for adapter in adapters)):
        check_files(Path(part.path), files.where)
    return files


def _adapter_config(section: ModelSection, where: str, offline: bool) -> dict[str, Any] | None:
    if section.gguf_file:
        return None
    if not offline:
        before_asking_hub(section.path)
    file = find_file(section.path, CONFIG, section.revision, offline)
    if file is None:
        return None
    return read_object(file, where)


def _check(config: dict[str, Any], where: str) -> None:
    """Raise UserError unless the adapter can be added to its base's weights."""
    base, kind, task = (
        config.get(key) for key in ("base_model_name_or_path", "peft_type", "task_type")
    )
    if not isinstance(base, str) or not base or not _is_name(base):
        raise UserError(f"{where}: its {CONFIG} does not say which model it adapts")
    peft = import_peft("an adapter")
    known = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) if isinstance(kind, str) else None
    if known is None:
        raise UserError(f"{where}: its peft_type is {kind!r}, which peft {peft.__version__} lacks")
    if task not in (None, "CAUSAL_LM"):
        raise UserError(f"{where}: its task_type is {task!r}, and must be 'CAUSAL_LM'")
    if issubclass(known, peft.PromptLearningConfig) or config.get("alora_invocation_tokens"):
        kind = "activated LoRA" if kind == "LORA" else kind
        raise UserError(
            f"{where}: an adapter of type {kind} changes what the model reads, and cannot be "
            "added to its weights; train a LoRA or another type that can"
        )
    if str(start := config.get("init_lora_weights")).startswith("pissa_niter"):
        raise UserError(
            f"{where}: {start} drew the weights under it at random, so nobody can load it "
            "again; save it with peft's path_initial_model_for_weight_conversion"
        )
    fields = {field.name for field in dataclasses.fields(known)}
    fields |= set(inspect.signature(known).parameters)
    for key in sorted(config.keys() - fields):
        if config[key]:
            raise UserError(
                f"{where}: its {CONFIG} has {key!r}, which peft {peft.__version__} does not know "
                "and would ignore; install the peft that wrote it"
            )


def _is_name(path: str) -> bool:
    """Whether a file can have this path."""
    try:
        Path(path).exists()
    except OSError:  # it is too long
        return False
    return "\0" not in path


def import_peft(what: str = "model.lora"):
    """Import peft, which is optional. Raises UserError, which says that `what` needs it."""
    try:
        import peft
    except ImportError:
        raise UserError(f"{what} needs peft: pip install peft") from None
    return peft
