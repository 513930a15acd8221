"""The hidden states that predict a rollout's tokens, for a batch of contexts and rollouts.

Legend: P context length, R rollout length, D hidden width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd.common.step_timer import phase
from opsd.prefix import (
    Group,
    live_hidden_states,
    separate_hidden_states,
    shared_prefix_hidden_states,
)


@dataclass(frozen=True)
class Scored:
    """A rollout in one role: the context it continues, and its own tokens."""

    context: Sequence[int]
    rollout: Sequence[int]

    def __len__(self) -> int:
        return len(self.context) + len(self.rollout)


def rollout_hidden_states(
    model: PreTrainedModel, sequences: Sequence[Scored], share: bool = True
) -> Tensor:
    """The last hidden states, after the final norm, that predict each rollout token: [Σ R, D].

    The state at position P - 1 predicts the first rollout token. The last rollout token is a target
    only and is not run through the model. `share`: a context that neighbours have in common is run
    once, and nothing is padded; the result is the same.
    """
    run = shared_prefix_hidden_states if share else separate_hidden_states
    return run(model, _groups(sequences))


def both_roles_hidden_states(
    model: PreTrainedModel,
    student: Sequence[Scored],
    teacher: Sequence[Scored],
    share: bool = True,
) -> tuple[Tensor, Tensor]:
    """`rollout_hidden_states` of a model that is its own teacher, whose states have no gradient.

    `share`: the tokens that both contexts start with run once, too.
    """
    if share and len(_groups(student)) == len(_groups(teacher)):
        return live_hidden_states(model, _groups(student), _groups(teacher))
    # The student first: autocast keeps the weights that it casts, for both, and must cast them
    # with their graph.
    with phase("student"):
        states = rollout_hidden_states(model, student, share)
    with torch.no_grad(), phase("teacher"):
        return states, rollout_hidden_states(model, teacher, share)


def student_and_teacher(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    students: Sequence[Scored],
    teachers: Sequence[Scored],
    share: bool = True,
) -> tuple[Tensor, Tensor]:
    """`rollout_hidden_states` of both roles; the teacher's, which may be `model` itself, have no
    gradient.
    """
    if teacher is model:
        return both_roles_hidden_states(model, students, teachers, share)
    with torch.no_grad(), phase("teacher"):
        seen = rollout_hidden_states(teacher, teachers, share)
    with phase("student"):
        return rollout_hidden_states(model, students, share), seen


def _groups(sequences: Sequence[Scored]) -> list[Group]:
    """Neighbours with the same context, together."""
    groups = ((context, list(rest)) for context, rest in groupby(sequences, _context))
    return [(context, [sequence.rollout for sequence in rest]) for context, rest in groups]


def _context(sequence: Scored) -> Sequence[int]:
    return sequence.context


Item = TypeVar("Item")
Roles = Callable[[Item], tuple[Scored, ...]]
