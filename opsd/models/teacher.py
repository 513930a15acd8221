"""Whose weights score the rollouts: `initial`, `live`, `ema`, or another `model`.

A teacher is a model of transformers and is never trained. It sees what the prompts show it; which
weights it has is decided here.
"""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd.common.errors import UserError
from opsd.common.precision import compute_dtype
from opsd.config.config import Config
from opsd.config.sections import ModelSection
from opsd.models.copies import copy_model
from opsd.models.head import head_arguments
from opsd.models.load import load_model, load_tokenizer
from opsd.models.lora import is_adapted, without_adapters
from opsd.models.moving_average import MovingAverage
from opsd.models.offload import offload
from opsd.models.quantize import quantize


def make_teacher(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    decoder: PreTrainedModel,
) -> tuple[PreTrainedModel, MovingAverage | None]:
    """The teacher's model, and its average where it has one to keep up to date.

    Args:
        model: the student at step 0; copied where the teacher's weights are its own.
        decoder: what holds the current weights, whole, for decoding; the `live` teacher. The
            teacher runs where it is.

    Raises UserError when teacher.path names a model with another vocabulary or another kind of
    output head.
    """
    policy = config.teacher.policy
    dtype = compute_dtype(config.train.precision)
    if policy == "live":
        return decoder, None
    if policy == "ema":
        # Over the decoder's frozen weights, which stay whole where the model's are split.
        start = decoder if is_adapted(model) else model
        section = config.teacher
        average = MovingAverage(start, section.ema_decay, decoder.device, section.update_every)
        return average.model, average
    if policy == "initial":
        if is_adapted(model):
            return without_adapters(decoder), None
        copied = copy_model(model, dtype, _first_place(config, decoder))
        return _in_less_memory(config, copied, decoder.device), None
    section, place = teacher_section(config), _first_place(config, decoder)
    teacher, its_tokenizer = load_model(section, place, dtype=dtype, name="teacher")
    check_vocabulary(tokenizer, its_tokenizer, config.teacher.path)
    ours, its = head_arguments(model), head_arguments(teacher)
    if ours != its:
        raise UserError(
            f"teacher.path is {config.teacher.path!r}: its logits are made with {its}, the "
            f"student's with {ours}; both must be made alike"
        )
    return _in_less_memory(config, teacher.requires_grad_(False).eval(), decoder.device), None


def teacher_section(config: Config) -> ModelSection:
    """Another model that teaches, as `load_model` is asked for it."""
    teacher = config.teacher
    its = {"path": teacher.path, "revision": teacher.revision, "gguf_file": teacher.gguf_file}
    return config.model.model_copy(update={**its, "lora": None})


def check_teacher(config: Config, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Raises UserError where another model is to teach and has another vocabulary; loads tokenizers
    alone."""
    if config.teacher.policy != "model":
        return
    ours = load_tokenizer(config.model) if tokenizer is None else tokenizer
    its = load_tokenizer(teacher_section(config), "teacher")
    check_vocabulary(ours, its, config.teacher.path)


def _first_place(config: Config, decoder: PreTrainedModel) -> torch.device:
    """Where a teacher is made: by the CPU if it may not fit the GPU as it is."""
    frugal = config.teacher.offload or config.teacher.quantize != "none"
    return torch.device("cpu") if frugal else decoder.device


def _in_less_memory(
    config: Config, teacher: PreTrainedModel, device: torch.device
) -> PreTrainedModel:
    """The teacher as teacher.quantize and teacher.offload have it, ready to run on `device`."""
    if config.teacher.quantize == "int8":
        quantize(teacher)
    if config.teacher.offload:
        return offload(teacher, device)
    return teacher.to(device)


def check_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, path: str
) -> None:
    """Raises UserError unless both tokenizers give every token the same id."""
    ours, its = student.get_vocab(), teacher.get_vocab()
    different = sorted(
        (token for token in ours.keys() | its.keys() if ours.get(token) != its.get(token)),
        key=lambda token: ours.get(token, its.get(token)),
    )
    if different:
        token = different[0]
        raise UserError(
            f"teacher.path is {path!r}: a teacher must have the student's vocabulary, and "
            f"{len(different):,} tokens differ (the first, {token!r}, is {ours.get(token)} for "
            f"the student and {its.get(token)} for the teacher)"
        )
