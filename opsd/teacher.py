"""Whose weights score the rollouts: `initial`, `live`, `ema`, or another `model`.

A teacher is a model of transformers and is never trained. It sees what the prompts show it; which
weights it has is decided here.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd.config import Config
from opsd.errors import UserError
from opsd.models import copy_model, head_arguments, load_model

FILE = "teacher.safetensors"


class MovingAverage:
    """An `ema` teacher: w ← decay · w + (1 - decay) · student, once an optimizer step.

    Kept in fp32, where an update of a thousandth of a small difference does not round to nothing.
    """

    def __init__(self, model: PreTrainedModel, decay: float):
        self.model, self.decay = copy_model(model, torch.float32), decay

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        """Move towards the student's current weights."""
        weights = dict(student.named_parameters())
        for name, average in self.model.named_parameters():
            average.lerp_(weights[name].to(average.dtype), 1 - self.decay)

    def save(self, checkpoint: Path) -> None:
        """Beside the checkpoint's other files."""
        named = {name: p.contiguous() for name, p in self.model.named_parameters()}
        save_file(named, checkpoint / FILE)

    @torch.no_grad()
    def load(self, checkpoint: Path) -> None:
        """What `save` wrote. Raises UserError where this checkpoint has none."""
        if not (checkpoint / FILE).is_file():
            raise UserError(
                f"teacher.policy is 'ema': {str(checkpoint)!r} holds no average ({FILE}); it was "
                "written under another policy"
            )
        saved = load_file(checkpoint / FILE)
        for name, average in self.model.named_parameters():
            average.copy_(saved[name])


def make_teacher(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    decoder: PreTrainedModel,
) -> tuple[PreTrainedModel, MovingAverage | None]:
    """The teacher's model, and its average where it has one to keep up to date.

    Args:
        model: the student at step 0; copied where the teacher's weights are its own.
        decoder: what holds the current weights for decoding; the `live` teacher.

    Raises UserError when teacher.path names a model with another vocabulary or another kind of
    output head.
    """
    policy = config.teacher.policy
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    if policy == "initial":
        return copy_model(model, dtype), None
    if policy == "ema":
        average = MovingAverage(model, config.teacher.ema_decay)
        return average.model, average
    if policy == "live":
        return decoder, None
    section = config.model.model_copy(
        update={
            "path": config.teacher.path,
            "revision": config.teacher.revision,
            "gguf_file": config.teacher.gguf_file,
        }
    )
    teacher, its_tokenizer = load_model(section, model.device, dtype=dtype, name="teacher")
    check_vocabulary(tokenizer, its_tokenizer, config.teacher.path)
    ours, its = head_arguments(model), head_arguments(teacher)
    if ours != its:
        raise UserError(
            f"teacher.path is {config.teacher.path!r}: its logits are made with {its}, the "
            f"student's with {ours}; both must be made alike"
        )
    return teacher.requires_grad_(False).eval(), None


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
