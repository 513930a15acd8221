"""What a run saves is whole or not there: written beside its place, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import rotate_checkpoints

from opsd.errors import UserError

PART = "checkpoint.part"


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write `directory`/model (safetensors). Raises UserError when the disk is full."""
    part = directory / "model.part"
    with _written_or_removed(part, model, "the model"):
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    shutil.rmtree(directory / "model", ignore_errors=True)
    part.rename(directory / "model")


class WholeCheckpoints(Trainer):
    """Trainer writes a checkpoint's files one by one into its final directory, where a crash or a
    full disk leaves some of them: here a checkpoint appears with all of them.
    """

    _writing = False

    def _get_output_dir(self, trial) -> str:
        directory = super()._get_output_dir(trial)
        return os.path.join(directory, PART) if self._writing else directory

    def _save_checkpoint(self, model, trial) -> None:
        directory = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        with _written_or_removed(
            directory / PART, model, f"{name} (--resume goes on from the last)"
        ):
            self._writing = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writing = False
        shutil.rmtree(directory / name, ignore_errors=True)
        (directory / PART / name).rename(directory / name)
        (directory / PART).rmdir()
        rotate_checkpoints(str(directory), self.args.save_total_limit)


@contextmanager
def _written_or_removed(part: Path, model: nn.Module, what: str) -> Iterator[None]:
    shutil.rmtree(part, ignore_errors=True)
    try:
        yield
    except Exception as error:
        # torch's writer and safetensors report a full disk in exceptions of their own.
        free = shutil.disk_usage(part.parent).free
        shutil.rmtree(part, ignore_errors=True)
        needed = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
        if free < needed:
            raise UserError(
                f"output.dir is {str(part.parent)!r}: the disk is full, {what} could not be "
                "written; what was saved before is whole, and `opsd train --resume` goes on from it"
            ) from error
        raise
