"""Steps that go wrong: memory that runs out, and numbers that are not finite.

A step whose loss or gradient is not finite leaves a file with its groups of samples and the weights
that it began with. `opsd replay FILE` finds the sample and the layer.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any
from zipfile import ZipFile

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from opsd.common.errors import UserError, in_short, problem_said
from opsd.common.files import write_file
from opsd.config.config import Config
from opsd.config.load import parse_config
from opsd.models.copies import full_tensor
from opsd.models.moving_average import MovingAverage
from opsd.objectives import SampleGroup
from opsd.training.checkpoints import read_tensors

IN_A_ROW = 3
"""Consecutive steps that train.not_finite 'skip' leaves out; then the run stops all the same."""


def out_of_memory(error: BaseException) -> bool:
    """Whether torch could not get the memory that it asked for."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def failed_step(
    config: Config,
    step: int,
    groups: Sequence[SampleGroup],
    model: nn.Module,
    average: MovingAverage | None,
) -> dict[str, Any]:
    """The content of a failed step's file. If weights are split, all processes must call this."""
    return {
        "config": config.model_dump(),
        "step": step,
        "groups": [asdict(group) for group in groups],
        "weights": {n: _on_cpu(p) for n, p in model.named_parameters() if p.requires_grad},
        "average": {n: _on_cpu(p) for n, p in average.averages.items()} if average else None,
    }


def _on_cpu(tensor: Tensor) -> Tensor:
    return full_tensor(tensor).detach().cpu()


def save_failed_step(directory: Path, failed: dict[str, Any]) -> Path:
    """Write the file; returns it."""
    path = directory / f"failed-step-{failed['step']}.pt"
    write_file(path, lambda file: torch.save(failed, file))
    return path


class _Batch(BaseModel):
    """What the file says of the step's batch. No type is guessed."""

    model_config = ConfigDict(strict=True, extra="forbid")
    step: Annotated[int, Field(ge=1, le=10**12)]
    groups: Annotated[list[SampleGroup], Field(min_length=1)]


@dataclass
class FailedStep:
    """A failed step's file."""

    config: Config
    step: int
    groups: list[SampleGroup]
    weights: dict[str, Tensor]
    average: dict[str, Tensor] | None


def read_failed_step(path: Path) -> FailedStep:
    """Read what `save_failed_step` wrote. The file may be a stranger's: raises UserError where it
    is anything else."""
    try:
        failed = read_tensors(path)
        with ZipFile(path) as file:  # torch looks at no checksum, and no manifest lies beside it
            if damaged := file.testzip():
                raise UserError(f"{damaged} in it is damaged")
        config, weights, average = (failed[key] for key in ("config", "weights", "average"))
        # As JSON: so pydantic takes objects for dataclasses, and yet no string for a number.
        batch = json.dumps({key: failed[key] for key in ("step", "groups")})
        checked = _Batch.model_validate_json(batch)
        config = parse_config(config)
        for number, group in enumerate(checked.groups):
            _check_group(f"groups.{number}", group, len(config.teacher.members()))
        return FailedStep(config, checked.step, checked.groups, weights, average)
    except ValidationError as error:
        said = problem_said(error.errors(include_url=False)[0])
    except UserError as error:
        said = str(error)
    except Exception as error:  # a pickle that holds more than tensors, or another kind of file
        said = in_short(error)
    raise UserError(f"FILE is {str(path)!r}: not a failed step's ({said})")


def _check_group(name: str, group: SampleGroup, members: int) -> None:
    contexts, strange = len(group.teachers) // members, len(group.teachers) % members
    if strange or len(group.coefficients) != members:
        raise UserError(f"{name} has not the {members} teachers of its config")
    if not group.samples or not all(map(len, (group.student, *group.teachers))):
        raise UserError(f"{name} has no samples, or a context without tokens")
    for number, sample in enumerate(group.samples):
        where, tokens = f"{name}.samples.{number}", sample.tokens
        for values in (sample.factors, sample.sampling_log_probs, sample.old_log_probs):
            if values is not None and len(values) != tokens:
                raise UserError(f"{where} has {len(values)} values for its {tokens} tokens")
        if not 0 <= sample.teacher < max(1, contexts):
            raise UserError(f"{where}.teacher is {sample.teacher}: there are {contexts}")
