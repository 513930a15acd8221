"""Makes the teacher, whose weights are `initial`, `live`, `ema`, or those of another `model`.

A teacher is a transformers model that is never trained. This module chooses its weights; the
prompts choose what it sees.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from opsd.common.errors import UserError
from opsd.common.urls import is_address
from opsd.config.sections import MemberSection, ModelSection, TeacherSection
from opsd.models.copies import copy_model
from opsd.models.head import CAPS, embedding_rows, head_arguments
from opsd.models.load import load_model, load_tokenizer
from opsd.models.lora import is_adapted, without_adapters
from opsd.models.moving_average import MovingAverage
from opsd.models.offload import offload
from opsd.models.quantize import quantize
from opsd.models.remote import RemoteTeacher


@dataclass(frozen=True)
class Member:
    """A model whose distribution is one factor of the teacher's; see `opsd.models.head.mixed`.

    context: what the model sees: student, teacher, or a name in prompts.contexts; "": the method's
    default. section: its entry in teacher.mix, with its coefficient; the default is for a teacher
    of one model. route: its name in teacher.routes; column: the data column with each row's route.
    """

    model: PreTrainedModel | None  # None for a method without a teacher
    context: str
    section: MemberSection = field(default_factory=MemberSection)
    route: str = ""
    column: str | None = None

    def route_of(self, columns: Mapping[str, Any]) -> str:
        """The route of a row with these columns."""
        return "" if self.column is None else columns[self.column]

    def coefficient(self, step: int, columns: Mapping[str, Any] | None = None) -> float:
        """The exponent of its distribution after `step` steps, for a row with these columns."""
        return self.section.coefficient_at(step, columns)


def make_members(
    teacher: TeacherSection,
    student: ModelSection,
    dtype: torch.dtype,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    decoder: PreTrainedModel,
) -> tuple[PreTrainedModel, MovingAverage | None, list[Member]]:
    """Make the teacher's models. Returns the first one, for display; the moving average, if a
    member has one; and all members of teacher.mix or teacher.routes, [] without them."""
    check_mixture(teacher, model.config)
    made: dict[tuple, tuple[PreTrainedModel, MovingAverage | None]] = {}
    members, first, routes = [], None, list(teacher.routes)
    for number, own in enumerate(teacher.members()):
        key = own.policy, own.path, own.revision, own.gguf_file
        if key not in made:
            made[key] = make_teacher(own, student, dtype, model, tokenizer, decoder)
        first = first or made[key][0]
        # The trained model itself, so that its forward pass serves this member too.
        its = model if own.policy == "live" else made[key][0]
        if teacher.mix:
            mixed = teacher.mix[number]
            members.append(Member(its, mixed.context or "", mixed))
        elif routes:
            members.append(Member(its, "", route=routes[number], column=teacher.column))
    average = next((average for _, average in made.values() if average is not None), None)
    return cast(PreTrainedModel, first), average, members


def check_mixture(teacher: TeacherSection, config: PreTrainedConfig) -> None:
    """Raise UserError for a model with a soft cap: its hidden states cannot be mixed."""
    text = config.get_text_config()
    cap = next((name for name in CAPS if getattr(text, name, None) is not None), None)
    if teacher.mix and cap is not None:
        raise UserError(
            f"teacher.mix has {len(teacher.mix)} members: {config.model_type} has a soft cap on "
            f"its logits ({cap} {getattr(text, cap):g}), under which a mixture of hidden states "
            "is not one of distributions; use a teacher of one member (teacher.policy)"
        )


def make_teacher(
    teacher: TeacherSection,
    student: ModelSection,  # the config section of the trained model
    dtype: torch.dtype,
    model: PreTrainedModel,  # the student at step 0; copied if the teacher needs own weights
    tokenizer: PreTrainedTokenizerBase,
    # The model with all current weights, which samples; also the `live` teacher. The teacher runs
    # on its device.
    decoder: PreTrainedModel,
) -> tuple[PreTrainedModel, MovingAverage | None]:
    """Make the teacher's model in `dtype`, and its moving average if it has one (else None).

    Raises UserError if teacher.path names a model with another vocabulary or kind of output head.
    """
    device = decoder.device
    if teacher.policy == "live":
        return decoder, None
    if teacher.policy == "ema":
        # Averaged adapters share the decoder's frozen weights, since the model's may be split.
        start = decoder if is_adapted(model) else model
        average = MovingAverage(start, teacher.ema_decay, device, teacher.update_every)
        return average.model, average
    if teacher.policy == "initial" and is_adapted(model):
        return without_adapters(decoder), None
    if teacher.policy == "model" and is_address(teacher.path):
        made = RemoteTeacher(teacher.path, teacher.server_patience, tokenizer, device, dtype)
        _check_alike(teacher, model, made)
        return made, None
    # Before it is made smaller, the teacher may not fit into the GPU's memory.
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
    """Load the model at teacher.path and freeze it; see `make_teacher`."""
    section = teacher_section(teacher, student)
    made, its_tokenizer = load_model(section, device, dtype=dtype, name="teacher")
    check_vocabulary(tokenizer, its_tokenizer, teacher.path)
    if (images := getattr(tokenizer, "images", None)) is not None:
        images.check_teacher(made.config, teacher.path)
    _check_alike(teacher, model, made)
    _lengthen(made.get_input_embeddings(), embedding_rows(model))
    return made.requires_grad_(False).eval()


def _check_alike(teacher: TeacherSection, model: PreTrainedModel, made: PreTrainedModel) -> None:
    ours, its = head_arguments(model), head_arguments(made)
    if ours != its:
        said = f"its logits are made with {its}, the student's with {ours}"
        raise UserError(f"teacher.path is {teacher.path!r}: {said}; both must be made alike")


def _lengthen(embedding: nn.Module, rows: int) -> None:
    """Add rows of zeros to an embedding, up to `rows`. The student may sample an id of its padding,
    for which a teacher with less padding has no row."""
    weight = embedding.weight.detach()
    if len(weight) < rows:
        zeros = weight.new_zeros(rows - len(weight), weight.shape[1])
        embedding.weight, embedding.num_embeddings = nn.Parameter(torch.cat([weight, zeros])), rows


def teacher_section(teacher: TeacherSection, student: ModelSection) -> ModelSection:
    """The section `model` for teacher.path: the student's with the teacher's files, no LoRA."""
    its = {"path": teacher.path, "revision": teacher.revision, "gguf_file": teacher.gguf_file}
    return student.model_copy(update={**its, "lora": None})


def check_teacher(
    teacher: TeacherSection,
    student: ModelSection,
    architecture: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> list[str]:
    """Run `check_mixture`, and `check_vocabulary` for each teacher with a path. Returns the tokens
    that only teachers have. `architecture`, `tokenizer`: the student's."""
    check_mixture(teacher, architecture)
    more: list[str] = []
    for own in teacher.members():
        if own.policy == "model" and not is_address(own.path):  # a server is asked later
            its = load_tokenizer(teacher_section(own, student), "teacher")
            more += check_vocabulary(tokenizer, its, own.path)
    return more


def check_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, path: str
) -> list[str]:
    """The tokens that only the teacher's vocabulary has, as added ones. It never sees them: a text
    that contains one is an error (`opsd.data.prompts`).

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
