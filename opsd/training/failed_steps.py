"""Handles steps that fail: memory runs out, or numbers are not finite.

A step whose loss or gradient is not finite writes a file with its groups of samples and the weights
before it. `opsd replay FILE` finds the sample and the layer.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar
from zipfile import ZipFile

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import SchemaValidator
from torch import Tensor, nn

from opsd.common.errors import UserError, in_short, problem_said
from opsd.common.files import write_file
from opsd.common.schema import first_errors
from opsd.config.config import Config
from opsd.config.load import parse_config
from opsd.models.copies import full_tensor
from opsd.models.images import ImageIds
from opsd.models.moving_average import MovingAverage
from opsd.objectives import SampleGroup
from opsd.training.checkpoints import read_tensors

IN_A_ROW = 3
"""With train.not_finite 'skip', the run stops when this many steps in a row are left out."""


def out_of_memory(error: BaseException) -> bool:
    """Whether torch could not allocate memory."""
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
    plain = [
        replace(g, student=list(g.student), teachers=[list(t) for t in g.teachers]) for g in groups
    ]
    contexts = [context for g in groups for context in (g.student, *g.teachers)]
    return {
        "config": config.model_dump(),
        "step": step,
        "groups": [asdict(group) for group in plain],
        "images": any(isinstance(context, ImageIds) for context in contexts),
        "weights": {n: _on_cpu(p) for n, p in model.named_parameters() if p.requires_grad},
        "average": {n: _on_cpu(p) for n, p in average.averages.items()} if average else None,
    }


def _on_cpu(tensor: Tensor) -> Tensor:
    return full_tensor(tensor).detach().cpu()


def save_failed_step(directory: Path, failed: dict[str, Any]) -> Path:
    """Write the file; returns its path."""
    path = directory / f"failed-step-{failed['step']}.pt"
    write_file(path, lambda file: torch.save(failed, file))
    return path


@dataclass
class _Batch:
    """The step and its groups as the file has them, with strict types."""

    __pydantic_config__: ClassVar = ConfigDict(strict=True, extra="forbid")
    step: Annotated[int, Field(ge=1, le=10**12)]
    groups: Annotated[list[SampleGroup], Field(min_length=1)]


@dataclass
class FailedStep:
    """The content of a failed step's file, checked."""

    config: Config
    step: int
    groups: list[SampleGroup]
    weights: dict[str, Tensor]
    average: dict[str, Tensor] | None


def read_failed_step(path: Path) -> FailedStep:
    """Read what `save_failed_step` wrote. The file may come from a stranger: raises UserError if it
    holds anything else."""
    try:
        failed = read_tensors(path)
        with ZipFile(path) as file:  # torch checks no checksums, and the file has no manifest
            if damaged := file.testzip():
                raise UserError(f"{damaged} in it is damaged")
        if failed["images"] is not False:
            raise UserError("its rows have images, which it does not hold")
        config, weights, average = (failed[key] for key in ("config", "weights", "average"))
        # From JSON, strict pydantic makes dataclasses of objects but no numbers of strings.
        batch = json.dumps({key: failed[key] for key in ("step", "groups")})
        schema = first_errors(TypeAdapter(_Batch).core_schema)
        checked = SchemaValidator(schema).validate_json(batch)
        config = parse_config(config)
        for number, group in enumerate(checked.groups):
            _check_group(f"groups.{number}", group, len(config.teacher.mix) or 1)
            if group.route not in (config.teacher.routes or [""]) and not group.given:
                raise UserError(
                    f"groups.{number}.route is {group.route!r}: its config has no such route"
                )
        return FailedStep(config, checked.step, checked.groups, weights, average)
    except ValidationError as error:
        said = problem_said(error.errors(include_url=False)[0])
    except UserError as error:
        said = str(error)
    except Exception as error:  # a pickle with more than tensors, or another kind of file
        said = in_short(error)
    raise UserError(f"FILE is {str(path)!r}: not a failed step's ({said})")


def _check_group(name: str, group: SampleGroup, members: int) -> None:
    contexts, strange = len(group.teachers) // members, len(group.teachers) % members
    if strange or len(group.coefficients) not in ({members} if contexts else {1, members}):
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
