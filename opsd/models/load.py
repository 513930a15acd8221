"""Loads a causal language model and its tokenizer, and checks that they can be trained."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, cast
from unittest.mock import patch

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from opsd.common.errors import UserError, in_short
from opsd.common.hub_offline import NO_ANSWER, before_asking_hub
from opsd.common.near import near_file, near_hub, near_model
from opsd.common.saved_directory import check_saved
from opsd.common.strict_json import read_object
from opsd.config.sections import ModelSection
from opsd.data.chat import ChatTemplate
from opsd.models import weight_files
from opsd.models.adapter_files import TOKENIZER, ModelFiles, model_files
from opsd.models.causal import check_causal
from opsd.models.copies import contiguous_head
from opsd.models.directory_check import check_kernels
from opsd.models.generation_config import keep_stop_tokens
from opsd.models.lora import four_bits, is_adapted
from opsd.models.merge import merge_adapter
from opsd.models.multimodal import auto_class, freeze_others
from opsd.models.routers import freeze_routers, leave_router_loss

Loader = TypeVar("Loader", bound=Callable)


def _gguf_read_once(load: Loader) -> Loader:
    """While `load` runs, transformers (5.24) reads a GGUF file's fields once, not four times, and
    makes gguf's table of names once, not for each tensor: of SmolLM2's 21 s 7 remain."""

    @functools.wraps(load)
    def loading(section: ModelSection, *given: Any, **named: Any) -> Any:
        if not section.gguf_file:
            return load(section, *given, **named)
        import gguf  # 50 ms, which no other model needs

        slow = ("GGUFReader", "get_tensor_name_map")
        with patch.multiple(gguf, **{name: functools.cache(getattr(gguf, name)) for name in slow}):
            return load(section, *given, **named)

    return cast(Loader, loading)


@_gguf_read_once
def load_model(
    section: ModelSection,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    name: str = "model",
    tokenizer: PreTrainedTokenizerBase | None = None,
    look: Callable[[PreTrainedConfig, PreTrainedTokenizerBase], None] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and its tokenizer. The default, fp32, is the dtype of weights that train.

    An adapter is added to its base's weights. `name`: the config section, for messages.
    `tokenizer`: use it instead of the model's own. `look`: called with the architecture and the
    tokenizer before weights are read. The model gets `stored_dtype`, the dtype in its files; the
    tokenizer gets `embedding_rows`, which may be fewer than its tokens, as in Gemma.
    Raises UserError for files that are missing, damaged, or do not fit.
    """
    whole, files = section, check_directory(section, name)
    section = files.base
    for part in (section, *(adapter.section for adapter in files.adapters)):
        check_saved(Path(part.path), f"{name}.path")
    placing = {}
    if whole.lora is not None and whole.lora.quantize == "nf4":
        if files.adapters:
            raise UserError(
                f"{name}.lora.quantize is 'nf4': {name}.path is {whole.path!r}, an adapter, and "
                "weights in 4 bits would round away what it adds; merge it, and train on that"
            )
        placing = {"quantization_config": four_bits(dtype), "device_map": {"": device}}
    tokenizer = tokenizer or load_tokenizer(whole, name)
    stored = section.path, section.revision, files.where
    tensors = {} if section.gguf_file else weight_files.stored_tensors(*stored)
    config = load_config(files)
    own = best_attention(config) if section.attention == "auto" else section.attention
    if own == "sdpa" and _soft_capped(config):
        raise UserError(f"{files.where}: set {name}.attention to 'eager' for it (it caps scores)")
    if tensors:
        with _or_unreachable(files, section):
            weight_files.check_size(config, tensors, section.trust_remote_code)
    size = getattr(config.get_text_config(), "vocab_size", None)
    shapes = [tensor.shape for tensor in tensors.values()] or [(size,)]
    if look is not None and any(size in shape for shape in shapes):  # else reading them says so
        rows = [adapter.rows for adapter in files.adapters if adapter.rows]
        tokenizer.embedding_rows = [size, *rows][-1]
        look(config, tokenizer)
    with _or_unreachable(files, section):
        model, found = auto_class(config).from_pretrained(
            section.path,
            output_loading_info=True,
            dtype=dtype,
            attn_implementation=own,
            use_safetensors=None if section.gguf_file else True,  # a pickle may run anything
            ignore_mismatched_sizes=True,  # the error below names them
            **_source(section),
            **placing,
        )
    if absent := sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]):
        raise UserError(  # transformers would initialise them at random and only log it
            f"{files.where}: {len(absent)} of the weights that its config.json asks for are not "
            f"there, or of another shape ({absent[0]})"
        )
    if not section.gguf_file:
        weight_files.check_all_used(model, found["unexpected_keys"], files.where)
    else:
        # The weights are plain fp32 now, but transformers 5 keeps the file's quantisation in the
        # config, and save_pretrained then refuses to write them.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
    whole_weights = name == "model" and (whole.lora is None or files.adapters)
    _check_unquantised(model, whole_weights, files.where)
    model.stored_dtype = weight_files.usual_dtype(tensors) or torch.float32
    path = str(Path(section.path) / (section.gguf_file or ""))
    weight_files.check_numbers(model.named_parameters(), tensors, files.where, path)
    if not placing:
        model = model.to(device)
    for adapter in files.adapters:
        model = merge_adapter(model, adapter, name)
        # Its tensors may be finite and its scale NaN or 1e300.
        weight_files.check_numbers(model.named_parameters(), {}, files.where, adapter.section.path)
    model.in_no_directory = bool(files.adapters)
    if (owner := files.owner("generation_config.json")) is not files.base:
        model.generation_config = GenerationConfig.from_pretrained(
            owner.path, revision=owner.revision
        )
    if whole.freeze_router:
        freeze_routers(model)
    return made_ready(model, tokenizer, files.where), tokenizer


def made_ready(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, where: str
) -> PreTrainedModel:
    """Prepare a loaded or given model for training, in place. Raises UserError if it cannot be."""
    if model.get_output_embeddings() is None:
        raise UserError(f"{where}: {type(model).__name__} has no output head, which makes logits")
    ends = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tokenizer.embedding_rows = len(ends[0])
    if ends[0] is not ends[1]:  # the head is not tied, whatever config.json says
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
    leave_router_loss(model)
    check_causal(model, where)
    freeze_others(model)
    keep_stop_tokens(model)
    return contiguous_head(model.eval())


def given_model(
    section: ModelSection,
    device: torch.device | str,
    dtype: torch.dtype,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Prepare a model from Python code in place, to be as `load_model` returns it."""
    _check_unquantised(model, section.lora is None, "model")
    model.stored_dtype = model.dtype
    model.in_no_directory = not model.name_or_path
    if not getattr(model, "is_quantized", False):
        cast(nn.Module, model).to(device=device, dtype=dtype)
    if section.freeze_router:
        freeze_routers(model)
    return made_ready(model, tokenizer, "model"), tokenizer


def _check_unquantised(model: PreTrainedModel, whole_weights: bool, where: str) -> None:
    if getattr(model, "is_quantized", False) and whole_weights:
        raise UserError(
            f"{where}: its weights are quantised, and can neither be trained whole nor take "
            "an adapter in: set model.lora, or take a base that is not quantised"
        )


def best_attention(config: PreTrainedConfig) -> str:
    """The name of transformers' attention for this architecture: sdpa, or eager where the model has
    no other that runs on every device, such as gpt-oss. On a GPU sdpa itself runs flash attention.
    """
    if _soft_capped(config):
        return "eager"
    try:
        found = auto_class(config)._model_mapping[type(config)]
    except KeyError:  # a class from the model's own repository
        return "sdpa"
    kind = found[0] if isinstance(found, tuple | list) else found
    return "sdpa" if kind._supports_sdpa else "eager"


def _soft_capped(config: PreTrainedConfig) -> bool:
    """Whether attention's scores have a soft cap, as Gemma 2's: sdpa would leave it out, and not
    every transformers refuses it then (5.17)."""
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))


def load_config(files: ModelFiles) -> PreTrainedConfig:
    """Load the base model's config. Raises UserError."""
    with _or_unreachable(files, files.base):
        config = AutoConfig.from_pretrained(files.base.path, **_source(files.base))
        config.get_text_config()  # fails for a model with several text configs, such as MusicGen
    check_kernels(config, files.where)
    if type(config) not in auto_class(config)._model_mapping and not hasattr(config, "auto_map"):
        raise UserError(
            f"{files.where}: transformers has no causal language model of type "
            f"{config.model_type!r}, which its config.json says; take a language model of text"
        )
    return config


def load_tokenizer(section: ModelSection, name: str = "model") -> PreTrainedTokenizerBase:
    """Load the tokenizer alone. Raises UserError if it is missing or has no eos token."""
    files = check_directory(section, name)
    owner = files.owner(*TOKENIZER)
    before_asking_hub(owner.path)
    with _or_unreachable(files, owner):
        tokenizer = AutoTokenizer.from_pretrained(owner.path, **_source(owner))
        written = tokenizer("1 + 1").input_ids  # a setting of the wrong type fails only now
        known = tokenizer.decode(written, skip_special_tokens=True).strip()
    said = f"makes {len(written):,} tokens of '1 + 1'"
    if not known:  # transformers makes an empty tokenizer where the files are missing
        said = "knows no text; copy its tokenizer.json, or tokenizer.model, from its base"
    if not known or len(written) > 1000:  # a file may put 10^6 of them before each text
        raise UserError(f"{name}.path is {section.path!r}: its tokenizer {said}")
    if not tokenizer.chat_template:  # old processors have it in a separate file
        file = weight_files.find_file(owner.path, "chat_template.json", owner.revision)
        tokenizer.chat_template = file and read_object(file, files.where).get("chat_template")
    return with_ends(tokenizer, f"{name}.path is {section.path!r}")


def with_ends(tokenizer: PreTrainedTokenizerBase, where: str) -> PreTrainedTokenizerBase:
    """Set a padding token where there is none. Raises UserError without an eos token."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"{where}: its tokenizer has no eos_token to end a rollout")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # safe: padding is found by lengths, never by ids
    return tokenizer


def _source(section: ModelSection) -> dict[str, Any]:
    arguments = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    return arguments | ({"gguf_file": section.gguf_file} if section.gguf_file else {})


@contextmanager
def _or_unreachable(files: ModelFiles, section: ModelSection) -> Iterator[None]:
    """Makes a UserError of any exception: missing or damaged files raise all kinds."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise _unreachable(files, section, error) from error


def _unreachable(files: ModelFiles, section: ModelSection, error: Exception) -> UserError:
    where, name, said = files.where, files.name, in_short(error)
    if "custom code" in said or "trust_remote_code" in said:
        return UserError(f"{where}: {name}.trust_remote_code is false, and it has code ({said})")
    if "attention implementation" in said:  # as for Gemma 2 and gpt-oss
        return UserError(f"{where}: set {name}.attention to 'eager' for it ({said})")
    if "FlashAttention" in said:  # config.json asks for it
        return UserError(f"{where}: set {name}.attention to 'sdpa' for it ({said})")
    if Path(section.path).exists():
        hint = "; copy its tokenizer.json from its base" if "backend tokenizer" in said else ""
        return UserError(f"{where}: it cannot be loaded ({said}){hint}")
    if "couldn't connect" in said or "offline mode" in said:
        said = NO_ANSWER
    owner = near_hub(section.path)
    if files.adapters:
        owner = "; the base_model_name_or_path in its adapter_config.json can be changed"
    return UserError(
        f"{where}: neither a model directory nor a hub model that can be reached ({said})"
        f"{near_file(section.path) or owner}"
    )


def check_directory(section: ModelSection, name: str = "model") -> ModelFiles:
    """Find the model's files. Raises UserError for a directory that holds no model or lacks the
    GGUF file that is named."""
    files = model_files(section, name)
    section, where = files.base, files.where
    path = Path(section.path)
    if section.gguf_file and not (path / section.gguf_file).is_file():
        raise UserError(
            f"{name}.gguf_file is {section.gguf_file!r}: no such file in {section.path!r}"
        )
    if path.is_dir() and not section.gguf_file and not (path / "config.json").is_file():
        hint = ", ".join(file.name for file in sorted(path.glob("*.gguf")))
        hint = f"; for a GGUF file set {name}.gguf_file ({hint})" if hint else near_model(path)
        raise UserError(f"{where}: a directory without config.json{hint}")
    if not section.gguf_file and not any(path.glob("*.safetensors*")):
        for pickled in path.glob("pytorch_model*.bin"):
            raise UserError(
                f"{where}: its weights are a pickle ({pickled.name}), which may run anything when "
                "it is read; save them as safetensors"
            )
    return files


def window(config: PreTrainedConfig) -> int | None:
    """The largest number of positions, or None where the model's config does not say."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if found is None or found > 0 else None  # XLNet says -1


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a rollout: the chat template's end of a turn, the tokenizer's eos token,
    and those of the generation config."""
    return stops_of(tokenizer, model.generation_config.eos_token_id)


def stops_of(tokenizer: PreTrainedTokenizerBase, eos: Any) -> frozenset[int]:
    """`stop_ids`, given a generation config's `eos_token_id`. Raises UserError if it is invalid."""
    extra = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(token) is not int or not -1 <= token < 2**31 for token in extra):
        raise UserError(
            f"eos_token_id of the model's generation_config.json (or config.json) is {eos!r}: it "
            "must be a token's number, or list such numbers"
        )
    turn = ChatTemplate(tokenizer).stops if tokenizer.chat_template else frozenset()
    return frozenset([tokenizer.eos_token_id, *turn, *(token for token in extra if token >= 0)])


def told_stops(tokenizer: PreTrainedTokenizerBase, stops: frozenset[int]) -> str:
    """A sentence that names the tokens that end a rollout."""
    named = zip(sorted(stops), tokenizer.convert_ids_to_tokens(sorted(stops)), strict=True)
    return f"Rollouts end at {', '.join(repr(name or token) for token, name in named)}"


def quiet_transformers() -> None:
    """Switch off transformers' progress bars and messages, and its and peft's warnings that concern
    no user of ours: they would break our display."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Its older releases have only the old names. `merge_adapter` ties the ends again.
    warnings.filterwarnings("ignore", ".* is deprecated and will be removed", FutureWarning)
    warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")


def checkpoint_activations(model: PreTrainedModel, kind: bool | Literal["reentrant"]) -> None:
    """Enable gradient checkpointing as train.gradient_checkpointing says."""
    if not kind:
        return
    model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    if kind == "reentrant" and is_adapted(model):
        # Reentrant checkpointing computes no gradient where the inputs need none, as those of a
        # frozen embedding.
        model.enable_input_require_grads()
