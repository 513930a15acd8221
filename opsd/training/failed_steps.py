"""Steps that go wrong: memory that runs out, and numbers that are not finite.

A step whose loss or gradient is not finite leaves a file with its samples and the weights it was
taken with; `opsd replay FILE` finds the sample and the layer.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opsd.common.files import write_file
from opsd.config.config import Config
from opsd.models.copies import full_tensor
from opsd.models.moving_average import MovingAverage
from opsd.objectives import Sample
from opsd.prefix.rollout_states import Scored

IN_A_ROW = 3
"""Steps that train.not_finite 'skip' leaves out before the run stops all the same."""


def out_of_memory(error: BaseException) -> bool:
    """Whether torch could not get the memory that it asked for."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def failed_step(
    config: Config,
    step: int,
    samples: Sequence[Sample],
    model: nn.Module,
    average: MovingAverage | None,
) -> dict[str, Any]:
    """What a replay needs. Of weights that are split, all processes must ask for it."""
    return {
        "config": config.model_dump(),
        "step": step,
        "samples": [asdict(sample) for sample in samples],
        "weights": {n: _kept(p) for n, p in model.named_parameters() if p.requires_grad},
        "average": {n: _kept(p) for n, p in average.averages.items()} if average else None,
    }


def _kept(tensor: Tensor) -> Tensor:
    return full_tensor(tensor).detach().cpu()


def save_failed_step(directory: Path, failed: dict[str, Any]) -> Path:
    """Write the file; returns it."""
    path = directory / f"failed-step-{failed['step']}.pt"
    write_file(path, lambda file: torch.save(failed, file))
    return path


def samples_of(failed: dict[str, Any]) -> list[Sample]:
    """The step's samples."""
    return [
        Sample(**{**saved, "roles": tuple(Scored(**role) for role in saved["roles"])})
        for saved in failed["samples"]
    ]
