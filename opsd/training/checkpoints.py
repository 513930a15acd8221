"""What a run saves is whole or not there: written beside its place, then renamed."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import rotate_checkpoints

from opsd.common.errors import UserError
from opsd.config.config import Config
from opsd.distributed.processes import Processes
from opsd.models.generation_config import as_shipped
from opsd.models.load import dtype_of, load_model
from opsd.models.lora import is_adapted
from opsd.runs.directory import read_whole

PART = "checkpoint.part"


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    name: str = "model",
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `directory`/`name` (safetensors). Raises UserError when the disk is full.

    `state`: the weights, where those of the model are split over processes.
    """
    part = directory / f"{name}.part"
    more = {"save_embedding_layers": False} if is_adapted(model) else {}
    with _written_or_removed(part, model, "the model"), as_shipped(model):
        model.save_pretrained(part, state_dict=state, **more)
        tokenizer.save_pretrained(part)
    shutil.rmtree(directory / name, ignore_errors=True)
    part.rename(directory / name)


def save_trained(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write model/; of a model with adapters these alone, or under output.merge the whole model,
    and the adapters in adapter/. `state`: the weights, where the model's are split."""
    if not config.output.merge:
        save_model(model, tokenizer, directory, state=state)
        return
    save_model(model, tokenizer, directory, "adapter", state)
    dtype = dtype_of(config.train.precision)
    section = config.model.model_copy(update={"path": str(directory / "adapter"), "lora": None})
    merged, _ = load_model(section, "cpu", dtype=dtype)
    save_model(merged, tokenizer, directory)


class WholeCheckpoints(Trainer):
    """Trainer writes a checkpoint's files one by one into its final directory, where a crash or a
    full disk leaves some of them: here a checkpoint appears with all of them.
    """

    processes: Processes
    _writing = False

    def _get_output_dir(self, trial) -> str:
        directory = super()._get_output_dir(trial)
        return os.path.join(directory, PART) if self._writing else directory

    def _save_checkpoint(self, model, trial) -> None:
        directory = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        part, first = directory / PART, self.processes.first
        if first:
            shutil.rmtree(part, ignore_errors=True)
        self.processes.wait()
        self._writing = True
        try:
            if first:
                what = f"{name} (--resume goes on from the last)"
                with _written_or_removed(part, model, what, self.is_deepspeed_enabled):
                    super()._save_checkpoint(model, trial)
            else:
                super()._save_checkpoint(model, trial)
        finally:
            self._writing = False
        self.processes.wait()
        if first:
            shutil.rmtree(directory / name, ignore_errors=True)
            (part / name).rename(directory / name)
            part.rmdir()
            rotate_checkpoints(str(directory), self.args.save_total_limit)
        self.processes.wait()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with read_whole(resume_from_checkpoint):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        with read_whole(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint) -> None:
        with read_whole(checkpoint):
            super()._load_rng_state(checkpoint)


@contextmanager
def _written_or_removed(part: Path, model, what: str, zero: bool = False) -> Iterator[None]:
    shutil.rmtree(part, ignore_errors=True)
    try:
        yield
    except Exception as error:
        # torch's writer and safetensors report a full disk in exceptions of their own.
        free = shutil.disk_usage(part.parent).free
        shutil.rmtree(part, ignore_errors=True)
        needed = checkpoint_bytes(model, zero)
        if free < needed:
            raise UserError(
                f"output.dir is {str(part.parent)!r}: the disk is full, {what} could not be "
                "written; what was saved before is whole, and `opsd train --resume` goes on from it"
            ) from error
        raise


def checkpoint_bytes(model: nn.Module, zero: bool = False) -> int:
    """What a checkpoint takes: what trains, and two moments of it; DeepSpeed's, that twice more."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return (5 if zero else 3) * sum(p.numel() * p.element_size() for p in trained)


def check_pieces(checkpoint: Path, processes: int) -> None:
    """Raises UserError where another number of processes wrote a checkpoint's pieces, or where one
    would run something when it is read, by DeepSpeed without a look at what it holds: tensors,
    plain values, and objects of three classes of its own."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with read_whole(checkpoint):
        name = (checkpoint / "latest").read_text().strip()
        if Path(name).name != name:
            raise ValueError(f"latest names {name}")
        pieces = list((checkpoint / name).glob("*.pt"))
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            for piece in pieces:
                torch.load(piece, "meta", weights_only=True, mmap=True)
    written = sum(piece.name.endswith("_optim_states.pt") for piece in pieces)
    if written != processes:
        raise UserError(
            f"{str(checkpoint)!r} was written by {written} processes, and there are {processes}: "
            "under ZeRO each goes on with its own piece; launch as many"
        )
