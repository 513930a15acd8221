"""`opsd replay`: runs a failed step's samples again one by one, to find what is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opsd.common.display import Display
from opsd.common.errors import UserError, in_short
from opsd.common.precision import autocast, compute_dtype, weights_dtype
from opsd.common.urls import is_address
from opsd.data.prompts import Prompts
from opsd.models.head import embedding_rows
from opsd.models.load import load_model
from opsd.models.lora import add_adapters
from opsd.models.teacher import make_members
from opsd.objectives import SampleGroup, Totals, make_objective
from opsd.rollout import Sampling
from opsd.training.failed_steps import FailedStep, read_failed_step
from opsd.training.step import OPSDStep


@dataclass(frozen=True)
class Replayed:
    """One sample's loss, gradient norm, and the first module whose output is not finite."""

    number: int
    tokens: int
    loss: float
    gradient: float
    module: str | None

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient)


def replay(
    path: Path, display: Display, trust_remote_code: bool = False, ask_teacher: bool = False
) -> list[Replayed]:
    """Run each sample of a failed-step-N.pt again and show a line for each. Raises UserError.

    The file may come from a stranger. So the caller decides, whatever the file's config says,
    whether code of its model and teacher may run and whether a teacher's server is asked.
    """
    failed = read_failed_step(path)
    config = failed.config
    config.model.trust_remote_code = trust_remote_code  # the teacher's too
    paths = [] if ask_teacher else [member.path for member in config.teacher.members()]
    for address in filter(is_address, paths):
        said = f"its teacher.path is {address!r}, which would get OPSD_TEACHER_KEY"
        raise UserError(f"FILE is {str(path)!r}: {said}; --ask-teacher allows it")
    try:
        found = _replay(failed, display)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        said = str(error) if isinstance(error, UserError) else in_short(error)
        if "trust_remote_code is false" in said:
            said += "; whatever the file says, --trust-remote-code allows it"
        raise UserError(f"FILE is {str(path)!r}: it does not run ({said})") from error
    rows = [
        [str(r.number), str(r.tokens), f"{r.loss:.4g}", f"{r.gradient:.4g}", r.module or ""]
        for r in found
    ]
    columns = ["sample", "tokens", "loss", "gradient", "first module that is not finite"]
    display.table(f"Step {failed.step} of {config.output.dir}", columns, rows)
    bad = [r.number for r in found if not r.finite]
    display.note(
        f"Not finite: samples {', '.join(map(str, bad))}"
        if bad
        else "All samples are finite by themselves here: the sum, the batch or the device did it"
    )
    return found


def _replay(failed: FailedStep, display: Display) -> list[Replayed]:
    config, groups = failed.config, failed.groups
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with display.stage(f"Load {config.model.path}"):
        dtype = weights_dtype(config.train.precision, adapted=config.model.lora is not None)
        model, tokenizer = load_model(config.model, device, dtype=dtype)
        if config.model.lora is not None:
            model = add_adapters(model, config.model)
        teacher, average, members = make_members(
            config.teacher, config.model, dtype, model, tokenizer, model
        )
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        _load(trained, failed.weights, "weights")
        if average is not None:
            _load(average.averages, failed.average, "average")
        elif failed.average is not None:
            raise UserError("average is in it, and a run of its config has none")
    largest = embedding_rows(model) - 1
    for ids in chain.from_iterable(map(_ids, groups)):
        if ids and not 0 <= min(ids) <= max(ids) <= largest:
            raise UserError(
                f"groups hold tokens {min(ids)} to {max(ids)}: the model has 0 to {largest}"
            )
    loss = config.loss.without_code()  # the file may come from a stranger
    prompts, sampling = Prompts(config.prompts, tokenizer), Sampling.of(config.rollout)
    objective = make_objective(config.method, loss, teacher, prompts, sampling, members)
    step = OPSDStep(model.train(), objective, share=config.train.share_prefixes)
    with autocast(torch.device(device), compute_dtype(config.train.precision)):
        alone = [group.of([sample]) for group in groups for sample in group.samples]
        return [_replayed(step, number, group) for number, group in enumerate(alone)]


def _ids(group: SampleGroup) -> Iterator[Sequence[int]]:
    yield from (group.student, *group.teachers)
    yield from (sample.rollout for sample in group.samples)


@torch.no_grad()
def _load(parameters: dict[str, nn.Parameter], saved: Any, name: str) -> None:
    """Copy the file's tensors into these parameters; names, dtypes and shapes must be the same."""
    if not isinstance(saved, dict):
        raise UserError(f"{name} are {type(saved).__name__}: tensors by their names are needed")
    for key in [*parameters, *saved]:
        if key not in saved or key not in parameters:
            raise UserError(f"{name} {'have' if key in saved else 'lack'} {key!r}")
    for key, parameter in parameters.items():
        kinds = [_kind(parameter), _kind(saved[key])]
        if kinds[0] != kinds[1]:
            raise UserError(f"{name}.{key} is {kinds[1]}: the model's is {kinds[0]}")
        parameter.copy_(saved[key])


def _kind(value: Any) -> str:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return f"no plain tensor but {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _replayed(step: OPSDStep, number: int, group: SampleGroup) -> Replayed:
    step.zero_grad(set_to_none=True)
    with _first_not_finite(step.model) as places:
        loss = step([group], Totals())
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward()
    squares = [p.grad.float().square().sum() for p in step.parameters() if p.grad is not None]
    gradient = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
    module = places[0] if places else None
    return Replayed(number, group.samples[0].tokens, float(loss.detach()), float(gradient), module)


@contextmanager
def _first_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """A context that collects the names of modules whose output is not finite, in running order."""
    places: list[str] = []

    def watch(name: str):
        def hook(module, inputs, output):
            tensors = output if isinstance(output, tuple) else (output,)
            if any(isinstance(t, torch.Tensor) and not t.isfinite().all() for t in tensors):
                places.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        yield places
    finally:
        for hook in hooks:
            hook.remove()
