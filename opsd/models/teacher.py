"""Whose weights score the rollouts: `initial`, `live`, `ema`, or another `model`.

A teacher is a model of transformers and is never trained. It sees what the prompts show it; which
weights it has is decided here.
"""

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd.common.errors import UserError
from opsd.config.sections import ModelSection, TeacherSection
from opsd.models.copies import copy_model
from opsd.models.head import head_arguments
from opsd.models.load import load_model, load_tokenizer
from opsd.models.lora import is_adapted, without_adapters
from opsd.models.moving_average import MovingAverage
from opsd.models.offload import offload
from opsd.models.quantize import quantize


def make_teacher(
    teacher: TeacherSection,
    student: ModelSection,  # the config's section of the model that trains
    dtype: torch.dtype,
    model: PreTrainedModel,  # the student at step 0; copied where the teacher's weights are its own
    tokenizer: PreTrainedTokenizerBase,
    # What holds all current weights, for sampling; the `live` teacher. The teacher runs on its
    # device
    decoder: PreTrainedModel,
) -> tuple[PreTrainedModel, MovingAverage | None]:
    """The teacher's model in `dtype`, and its moving average where it has one to keep up to date.

    Raises UserError when teacher.path names a model with another vocabulary or another kind of
    output head.
    """
    device = decoder.device
    if teacher.policy == "live":
        return decoder, None
    if teacher.policy == "ema":
        # The average of adapters stands beside the decoder's frozen weights: the model's own may
        # be split over processes.
        start = decoder if is_adapted(model) else model
        average = MovingAverage(start, teacher.ema_decay, device, teacher.update_every)
        return average.model, average
    if teacher.policy == "initial" and is_adapted(model):
        return without_adapters(decoder), None
    # A teacher that is to take less memory may not fit the GPU before it does.
    smaller = teacher.offload or teacher.quantize != "none"
    load_device = torch.device("cpu") if smaller else device
    if teacher.policy == "initial":
        made = copy_model(model, dtype, load_device)
    else:
        made = _load_teacher(teacher, student, dtype, load_device, model, tokenizer)
    if teacher.quantize == "int8":
        quantize(made)
    return offload(made, device) if teacher.offload else made.to(device), None


def _load_teacher(
    teacher: TeacherSection,
    student: ModelSection,
    dtype: torch.dtype,
    device: torch.device,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel:
    """The model at teacher.path, frozen; see `make_teacher`."""
    section = teacher_section(teacher, student)
    made, its_tokenizer = load_model(section, device, dtype=dtype, name="teacher")
    check_vocabulary(tokenizer, its_tokenizer, teacher.path)
    ours, its = head_arguments(model), head_arguments(made)
    if ours != its:
        raise UserError(
            f"teacher.path is {teacher.path!r}: its logits are made with {its}, the "
            f"student's with {ours}; both must be made alike"
        )
    _lengthen(made.get_input_embeddings(), len(model.get_input_embeddings().weight))
    return made.requires_grad_(False).eval()


def _lengthen(embedding: nn.Module, rows: int) -> None:
    """Give an embedding rows of zeros up to `rows`: the student can draw an id of its padding that
    a teacher which is padded less has no row for."""
    weight = embedding.weight.detach()
    if len(weight) < rows:
        zeros = weight.new_zeros(rows - len(weight), weight.shape[1])
        embedding.weight, embedding.num_embeddings = nn.Parameter(torch.cat([weight, zeros])), rows


def teacher_section(teacher: TeacherSection, student: ModelSection) -> ModelSection:
    """The section `model` for teacher.path: the student's, with the teacher's files."""
    its = {"path": teacher.path, "revision": teacher.revision, "gguf_file": teacher.gguf_file}
    return student.model_copy(update={**its, "lora": None})


def check_teacher(
    teacher: TeacherSection, student: ModelSection, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[str]:
    """`check_vocabulary` where another model is to teach; `tokenizer`: the student's, if loaded."""
    if teacher.policy != "model":
        return []
    ours = load_tokenizer(student) if tokenizer is None else tokenizer
    its = load_tokenizer(teacher_section(teacher, student), "teacher")
    return check_vocabulary(ours, its, teacher.path)


def check_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, path: str
) -> list[str]:
    """The tokens that were added to the teacher's vocabulary alone: it never sees them, and a text
    with one is an error (`opsd.data.prompts`).

    Raises UserError unless both tokenizers give every other token the same id.
    """
    ours, its, added = student.get_vocab(), teacher.get_vocab(), teacher.get_added_vocab()
    more = sorted(added.keys() - ours.keys())
    different = sorted(
        (t for t in ours.keys() | its.keys() if ours.get(t) != its.get(t) and t not in more),
        key=lambda token: ours.get(token, its.get(token)),
    )
    if different:
        token = different[0]
        raise UserError(
            f"teacher.path is {path!r}: a teacher must have the student's vocabulary, and "
            f"{len(different):,} tokens differ (the first, {token!r}, is {ours.get(token)} for "
            f"the student and {its.get(token)} for the teacher)"
        )
    return more
