"""Saves models and checkpoints, each completely or not at all: see common/saved_directory.py."""

import copy
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from accelerate import Accelerator, DistributedType
from accelerate import utils as fsdp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from opsd.common.errors import UserError
from opsd.common.files import remove, write_file, write_json
from opsd.common.random_states import random_states, set_random_states
from opsd.common.saved_directory import MANIFEST, new_directory, read_manifest
from opsd.config.sections import ModelSection, OutputSection
from opsd.distributed.processes import Processes
from opsd.models.generation_config import as_shipped
from opsd.models.images import save_tokenizer
from opsd.models.load import load_model
from opsd.models.lora import is_adapted
from opsd.models.moving_average import MovingAverage
from opsd.models.remote import RemoteTeacher
from opsd.models.routers import asking_as_shipped
from opsd.rollout import RolloutsAhead
from opsd.runs.directory import checkpoints_in, or_unreadable, written
from opsd.runs.records import TrainerState as SavedState
from opsd.runs.records import read_record
from opsd.training.rollouts_ahead import FILE as ROLLOUTS_AHEAD
from opsd.training.rollouts_ahead import as_tensors, of_tensors


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    name: str = "model",
    state: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    trial: bool = False,
) -> None:
    """Write `directory`/`name` (safetensors). Raises UserError.

    `state`: the weights, if those of the model are split over processes. `dtype`: write in this
    dtype; None: in the weights' own. `trial`: write only one entry of each weight.
    """
    adapted = is_adapted(model)
    more: dict[str, Any] = {"save_embedding_layers": False} if adapted else {}
    if trial and not adapted:
        state = {name: _one_entry(tensor) for name, tensor in model.state_dict().items()}
        more["save_original_format"] = False  # that format may split a weight
    with (
        written(directory, f"{name}/", checkpoint_bytes(model)),
        new_directory(directory / name) as place,
        as_shipped(model),
        asking_as_shipped(model),
    ):
        if dtype is not None:
            state = _in_dtype(model.state_dict() if state is None else state, model, dtype)
        model.save_pretrained(place, state_dict=state, **more)
        if dtype is not None and not adapted:
            config_in(model.config, dtype).save_pretrained(place)
        save_tokenizer(tokenizer, place)


def _one_entry(tensor: Tensor) -> Tensor:
    """A view of one entry in the same storage, so that tied weights stay tied."""
    return tensor.as_strided([1] * tensor.dim(), tensor.stride()) if tensor.numel() else tensor


def _in_dtype(
    state: Mapping[str, Tensor], model: PreTrainedModel, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Cast the weights to `dtype`, keeping tied ones tied and buffers as they are. Of a model with
    adapters only these are returned."""
    left = {name for name, _ in model.named_buffers()}
    if is_adapted(model):
        left |= {name for name, p in model.named_parameters() if not p.requires_grad}
        state = {name: tensor for name, tensor in state.items() if name not in left}
    made = {
        (t.data_ptr(), t.shape): t.to(dtype) if t.is_floating_point() else t
        for name, t in state.items()
        if name not in left
    }
    return {name: made.get((t.data_ptr(), t.shape), t) for name, t in state.items()}


def config_in(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedConfig:
    """Copy the config, with its sub-configs, and set this dtype in all of them."""
    config = copy.deepcopy(config)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    return config


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def save_trained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    output: OutputSection,
    state: dict[str, Tensor] | None = None,  # the weights, if they are split over processes
    section: ModelSection | None = None,  # the model's section, to load it again for merging
    name: str = "model",
) -> None:
    """Write `directory`/`name` as `output` says; of a model with adapters only the adapters.

    Unless output.dtype says otherwise, weights are rounded from fp32 to the dtype of the model's
    files. Adapters stay in fp32: they are small, and so are the changes they make, part of which
    rounding would lose.
    """
    asked = DTYPES.get(output.dtype)
    stored = asked or getattr(model, "stored_dtype", model.dtype)
    weights = model.parameters() if state is None else state.values()
    if stored == torch.float16 and any(weight.abs().max() > 65504 for weight in weights):
        stored = torch.float32  # such a weight is inf in fp16
    if not is_adapted(model):
        save_model(model, tokenizer, directory, name, state, stored)
        return
    beside = "adapter" if name == "model" else f"{name}-adapter"
    save_model(model, tokenizer, directory, beside if output.merge else name, state, asked)
    if output.merge:
        section = section.model_copy(update={"path": str(directory / beside), "lora": None})
        merged, _ = load_model(section, "cpu", dtype=stored)
        save_model(merged, tokenizer, directory, name, dtype=stored)


@dataclass
class Checkpoints:
    """Writes and reads checkpoint-<step>/: all that a run needs to resume bit for bit."""

    directory: Path  # of the run
    limit: int  # how many checkpoints are kept
    processes: Processes
    accelerator: Accelerator
    model: PreTrainedModel
    wrapped: nn.Module  # the model in DDP, FSDP2 or DeepSpeed; with one process the model itself
    tokenizer: PreTrainedTokenizerBase
    optimizer: Optimizer
    schedule: LRScheduler
    average: MovingAverage | None  # of an `ema` teacher
    own: Mapping[str, list[float]]  # `some_weights` of the "base" at step 0, and of the "teachers"

    def write(self, state: TrainerState, ahead: RolloutsAhead | None = None) -> None:
        """Write a checkpoint; then remove all but the last `limit`. Raises UserError."""
        place = self.directory / f"checkpoint-{state.global_step}"
        needed = checkpoint_bytes(self.model, self._zero)
        rollouts = ahead and ahead.kept()
        with written(self.directory, place.name, needed), ExitStack() as stack:
            new = partial(new_directory, place, dict(self.own))
            there = self.processes.once(lambda: stack.enter_context(new()))
            if rollouts and self.processes.first:
                _save(as_tensors(rollouts), there / ROLLOUTS_AHEAD)
            self._write_files(there, state)
        if self.processes.first:
            whole = [c for c in checkpoints_in(self.directory) if (c / MANIFEST).is_file()]
            for old in whole[: -self.limit]:
                remove(old)
        self.processes.wait()

    def _write_files(self, place: Path, state: TrainerState) -> None:
        if self._fsdp:
            plugin, accelerator, where = self._fsdp, self.accelerator, str(place)
            fsdp.save_fsdp_model(plugin, accelerator, self.wrapped, where, adapter_only=True)
            fsdp.save_fsdp_optimizer(plugin, accelerator, self.optimizer, self.wrapped, where)
        else:
            weights = self.accelerator.get_state_dict(self.wrapped) if self._zero else None
            if self.processes.first:
                # `load_weights` finds the weights by the model's own names.
                own = {} if is_adapted(self.model) else {"save_original_format": False}
                self.model.save_pretrained(place, state_dict=weights, **own)
                (place / "README.md").unlink(missing_ok=True)  # peft's empty model card
                save_tokenizer(self.tokenizer, place)
            if self._zero:
                self.wrapped.save_checkpoint(
                    str(place), exclude_frozen_parameters=is_adapted(self.model)
                )
            elif self.processes.first:
                _save(self.optimizer.state_dict(), place / "optimizer.pt")
        _save(random_states(), place / self._random_file)
        if self.processes.first:
            _save(self.schedule.state_dict(), place / "scheduler.pt")
            if self.average is not None:
                self.average.save(place)
            write_json(place / "trainer_state.json", asdict(state))
        self.processes.wait()

    def read(
        self, place: Path, state: TrainerState, steps_an_epoch: int, falls: bool = False
    ) -> None:
        """Restore all but random states as `write` saved it; the progress goes into `state`.
        Raises UserError if another number of steps changes the rows, or the rate where it `falls`.
        """
        if self.average is not None:
            self.average.load(place)
        with or_unreadable(place):
            manifest = read_manifest(place) or {}
            for name, path in {"base": "model.path", "teachers": "teacher.path"}.items():
                if not _alike(manifest[name], self.own[name]):
                    raise ValueError(f"its run began with other weights than those in {path} now")
            if self._fsdp:
                plugin, accelerator, where = self._fsdp, self.accelerator, str(place)
                fsdp.load_fsdp_model(plugin, accelerator, self.wrapped, where, adapter_only=True)
                fsdp.load_fsdp_optimizer(
                    plugin, accelerator, self.optimizer, self.wrapped, where, adapter_only=True
                )
            elif self._zero:
                strict = not is_adapted(self.model)
                self.wrapped.load_checkpoint(str(place), load_module_strict=strict)
            else:
                load_weights(self.model, place, manifest["files"])
                self.optimizer.load_state_dict(read_tensors(place / "optimizer.pt"))
            self.schedule.load_state_dict(read_tensors(place / "scheduler.pt"))
            saved = read_record(place / "trainer_state.json", SavedState)
            state.global_step, state.epoch = saved.global_step, saved.epoch
            state.log_history = saved.log_history
        other_rows = state.epoch != state.global_step / steps_an_epoch
        if other_rows or (falls and saved.max_steps not in (None, state.max_steps)):
            raise UserError(
                f"train.steps is {state.max_steps}, and was {saved.max_steps}: data.varied depends "
                "on it, or its rate; keep it, or begin another run in another output.dir"
            )

    def read_ahead(
        self, place: Path, count: int, longest: int, vocabulary: int
    ) -> RolloutsAhead | None:
        """Read the next step's rollouts, if the checkpoint has them; see `of_tensors`."""
        if not (place / ROLLOUTS_AHEAD).is_file():
            return None
        with or_unreadable(place):
            found = read_tensors(place / ROLLOUTS_AHEAD)
            rollouts = of_tensors(found, count, longest, vocabulary)
        return RolloutsAhead.of(rollouts, self.processes)

    def read_random_states(self, place: Path) -> None:
        """Restore this process's random states. Of more processes than wrote them the further ones
        keep what their seed gave them."""
        first = ["rng_state.pth", "rng_state_0.pth"] if self.processes.first else []
        with or_unreadable(place):  # whose manifest has been checked
            for file in (place / name for name in [self._random_file, *first]):
                if file.is_file():
                    return set_random_states(read_tensors(file))

    @property
    def _random_file(self) -> str:
        alone = self.processes.count == 1
        return "rng_state.pth" if alone else f"rng_state_{self.processes.index}.pth"

    @property
    def _zero(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    @property
    def _fsdp(self):
        return getattr(self.accelerator.state, "fsdp_plugin", None)


def _save(value: Any, file: Path) -> None:
    write_file(file, partial(torch.save, value))


def read_tensors(path: Path) -> Any:
    """Read a file of torch.save that holds only tensors and plain values and is not compressed."""
    _check_archive(path)
    found = torch.load(path, map_location="cpu", weights_only=True)
    _check_repeats(found, path)
    return found


def _check_archive(path: Path) -> None:
    """Raise ValueError if the file is compressed, or if a member that is neither values nor tensors
    (`version`, `byteorder`), of which torch makes several copies, is large."""
    with ZipFile(path) as file:
        members = file.infolist()
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("it is compressed, and torch writes no such files")
    for member in members:
        if not re.search(r"/data(\.pkl$|/)", member.filename) and member.file_size > 1 << 20:
            raise ValueError(f"{member.filename} in it has {member.file_size:,} bytes")


def _check_repeats(found: Any, path: Path) -> None:
    """Raise ValueError if lists in lists, or texts, each written once and named twice, stand for
    far more values than the file has bytes: whatever goes through them would not end."""
    most = path.stat().st_size + (1 << 20)
    sizes: dict[int, int] = {}

    def count(value: Any) -> int:
        if not isinstance(value, dict | list | tuple | set):
            return 1 + len(value) if isinstance(value, str | bytes) else 1
        if id(value) not in sizes:
            sizes[id(value)] = most  # too many, if it is inside of itself
            inside = chain.from_iterable(value.items()) if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(map(count, inside))
        return sizes[id(value)]

    if count(found) > most:
        raise ValueError("its lists repeat one another without end")


def some_weights(model: nn.Module) -> list[float]:
    """One entry of each weight that adapters do not change, or the bytes of a served teacher's
    digest: enough to recognise a model."""
    if isinstance(model, RemoteTeacher):
        return [float(byte) for byte in bytes.fromhex(model.about.weights)]
    adapted = is_adapted(model)
    fixed = [p.detach() for p in model.parameters() if not (adapted and p.requires_grad)]
    return [float(weight.reshape(-1)[weight.numel() // 2]) for weight in fixed if weight.numel()]


def _alike(one: list[float], other: list[float]) -> bool:
    """Whether both come from the same weights, up to rounding when adapters are merged."""
    close = partial(math.isclose, rel_tol=0.02, abs_tol=1e-6)
    return len(one) == len(other) and all(map(close, one, other))


def load_weights(model: PreTrainedModel, place: Path, names: Iterable[str]) -> None:
    """Load the weights that `save_pretrained` wrote into the model's own tensors.

    names: the files that were written; other files may come from a stranger.
    """
    ours = [place / n for n in names if fnmatch(n, "*model*.safetensors")]
    state = {name: tensor for file in ours for name, tensor in load_file(file).items()}
    if is_adapted(model):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, state)
        return
    model.load_state_dict(state, strict=False)  # tied weights are saved once
    loaded = {p.data_ptr() for name, p in model.state_dict().items() if name in state}
    missing = [name for name, p in model.named_parameters() if p.data_ptr() not in loaded]
    if missing:
        raise ValueError(f"it lacks {missing[0]}")


def checkpoint_bytes(model: nn.Module, zero: bool = False) -> int:
    """The size of a checkpoint: the trained weights and two moments of each. DeepSpeed's is larger
    by the weights' size twice."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return (5 if zero else 3) * sum(p.numel() * p.element_size() for p in trained)


def check_pieces(checkpoint: Path, processes: int) -> None:
    """Raise UserError if another number of processes wrote the checkpoint's pieces, or if a piece
    could run code when it is read. DeepSpeed reads without checks, so this allows only tensors,
    plain values, and objects of three of its classes."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with or_unreadable(checkpoint):
        name = (checkpoint / "latest").read_text().strip()
        if Path(name).name != name:
            raise ValueError(f"latest names {name}")
        pieces = list((checkpoint / name).glob("*.pt"))
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            for piece in pieces:
                _check_archive(piece)
                _check_repeats(torch.load(piece, "meta", weights_only=True, mmap=True), piece)
    written = sum(piece.name.endswith("_optim_states.pt") for piece in pieces)
    if written != processes:
        raise UserError(
            f"{str(checkpoint)!r} was written by {written} processes, and there are {processes}: "
            "under ZeRO each goes on with its own piece; launch as many"
        )
