"""A student and a `live` teacher: the start that their contexts share runs once, for both."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd.common.step_timer import phase
from opsd.models.lora import adapter_state
from opsd.prefix.hidden_states import shared_prefix_hidden_states
from opsd.prefix.layout import Group, Layout
from opsd.prefix.packed_forward import Keep, Kept, run
from opsd.prefix.prefix_cache import keeps_any
from opsd.prefix.supported_models import groups_of, unpackable


def live_hidden_states(
    model: PreTrainedModel, student: Sequence[Group], teacher: Sequence[Group]
) -> tuple[Tensor, Tensor]:
    """`shared_prefix_hidden_states` of both roles of one model, [Σ R, D] each.

    `student` and `teacher` hold the same problems' groups. Where two prefixes start with the same
    tokens, the teacher reads the keys and values of the student's pass. The teacher's states, and
    what it reads, carry no gradient. Raises ValueError where the adapters that apply change between
    the two passes.
    """
    student, teacher = groups_of(model, student), groups_of(model, teacher)
    common = [_common(s, t) for (s, _), (t, _) in zip(student, teacher, strict=True)]
    if unpackable(model) is not None or not any(common) or keeps_any(student + teacher):
        # The student first: autocast keeps the weights it casts, with their graph.
        with phase("student"):
            states = shared_prefix_hidden_states(model, student)
        with torch.no_grad(), phase("teacher"):
            return states, shared_prefix_hidden_states(model, teacher)
    layout = Layout(student, model.device)
    starts = [segment.queries.start for segment in layout.segments[: len(student)]]
    rows = [torch.arange(s, s + c) for s, c in zip(starts, common, strict=True)]
    kept: Kept = {}
    before = adapter_state(model)
    with phase("student"):
        states = run(model, layout, keep=Keep(kept, torch.cat(rows).to(model.device)))
    rest = [(prefix[c:], ids) for (prefix, ids), c in zip(teacher, common, strict=True)]
    _check_adapters(before, adapter_state(model))
    with torch.no_grad(), phase("teacher"):
        return states, run(model, Layout(rest, model.device, common), past=kept)


def _check_adapters(student: tuple[bool, ...], teacher: tuple[bool, ...]) -> None:
    """What the teacher reads was computed with the student's adapters: with others its states would
    be of no model at all."""
    differ = sum(a != b for a, b in zip(student, teacher, strict=True))
    if differ:
        raise ValueError(
            f"{differ} of {len(student)} adapted layers apply their adapters for one role and not "
            "for the other, which reads its keys and values: switch adapters on or off for a whole "
            "step, or take a teacher of its own weights (opsd.models.lora.without_adapters)"
        )


def _common(student: Tensor, teacher: Tensor) -> int:
    """The length of the common start; the teacher's last token is left to run."""
    length = min(len(student), len(teacher) - 1)
    differs = (student[:length] != teacher[:length]).nonzero()
    return int(differs[0]) if len(differs) else length
