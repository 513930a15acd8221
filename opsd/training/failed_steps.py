"""Steps that go wrong: memory that runs out, and numbers that are not finite.

A step whose loss or gradient is not finite leaves a file with its groups of samples and the weights
that it began with. `opsd replay FILE` finds the sample and the layer.
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
from opsd.objectives import Sample, SampleGroup

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


def groups_of(failed: dict[str, Any]) -> list[SampleGroup]:
    """The step's groups."""
    return [
        SampleGroup(**{**saved, "samples": [Sample(**sample) for sample in saved["samples"]]})
        for saved in failed["groups"]
    ]
