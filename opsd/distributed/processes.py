"""This process and the others of `torchrun` or `accelerate launch`; one process without a launcher.

The first process decides and writes; all of them sample and compute. The objects that are
exchanged, rollouts and losses, are small beside the gradients, which DDP and FSDP2 exchange.
"""

import os
import pickle
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

Result = TypeVar("Result")

SPLIT_WEIGHTS = ("fsdp2", "zero3")
"""Values of train.sharding with which no process holds all of the trained weights."""

PATIENCE = timedelta(hours=2)
"""How long a process waits for the others, which may sample or grade during this time."""


class Processes:
    """The run's processes; `index` is this one's number, of `count`."""

    def __init__(self):
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        self.index, self.count = state.process_index, state.num_processes
        self.device = state.device
        self.first = self.index == 0

    def together(self, function: Callable[[], Result]) -> Result:
        """Call the function in every process, for its own result. One that fails fails all."""
        if self.count == 1:
            return function()
        result, error = _outcome(function)
        errors: list[Exception | None] = [None] * self.count
        dist.all_gather_object(errors, error)
        return _result((result, next((e for e in errors if e is not None), None)))

    def everywhere(self, function: Callable[[], Result]) -> list[Result]:
        """Call the function in every process; all return the list of all results, in the processes'
        order. If one fails, all raise its error."""
        if self.count == 1:
            return [function()]
        outcomes: list[Any] = [None] * self.count
        dist.all_gather_object(outcomes, _outcome(function))
        return [_result(outcome) for outcome in outcomes]

    def once(self, function: Callable[[], Result]) -> Result:
        """Call the function in the first process; all return its result or raise its error."""
        if self.count == 1:
            return function()
        box = [_outcome(function) if self.first else None]
        dist.broadcast_object_list(box, src=0)
        return _result(box[0])

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.count > 1:
            dist.barrier()

    @staticmethod
    def close() -> None:
        """Destroy the process group and accelerate's state."""
        deepspeed = sys.modules.get("deepspeed")
        if deepspeed is not None and deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()  # DeepSpeed keeps copies of the group
        elif dist.is_initialized() and "LOCAL_RANK" in os.environ:  # otherwise the group is vLLM's
            dist.destroy_process_group()
        for note in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):  # accelerate sets them
            os.environ.pop(note, None)
        PartialState._reset_state()


def _outcome(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}").with_traceback(
                error.__traceback__
            )
        return None, error


def _result(outcome: tuple[Any, Exception | None]) -> Any:
    value, error = outcome
    if error is None:
        return value
    error.shared = True  # type: ignore[attr-defined]  # see `said_elsewhere`
    raise error
