"""Checks, before work starts, that the machine and the launcher can do the run."""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)
from transformers.training_args import OptimizerNames, ParallelMode

from opsd.common.errors import UserError, in_short
from opsd.common.files import reserve, why_not_written
from opsd.common.hub_upload import check_hub
from opsd.common.near import did_you_mean
from opsd.common.precision import best_precision
from opsd.config.compatibility import check_without_gpu, refused
from opsd.config.config import Config
from opsd.config.foreign import here
from opsd.config.requirements import check_packages, shows_images
from opsd.config.sections import TrainSection
from opsd.distributed.deepspeed import STAGES
from opsd.distributed.processes import Processes
from opsd.models.adapter_files import CONFIG as ADAPTER
from opsd.models.adapter_files import import_peft
from opsd.models.load import quiet_transformers
from opsd.models.lora import is_adapted
from opsd.prefix import use_kernel
from opsd.runs.directory import settle
from opsd.training.checkpoints import checkpoint_bytes, save_model
from opsd_kernels import backends


def begin(config: Config, processes: Processes) -> Config:
    """Check the machine and fill in what the run decides when it begins. Raises UserError if this
    machine cannot do the run."""
    check_config("config", config)
    quiet_transformers()
    check_launcher(config.train.sharding, config.rollout.engine)
    use_kernel(config.train.prefix_kernel)
    directory = Path(config.output.dir)
    config = processes.once(lambda: settle(config, directory, best_precision()))
    processes.together(lambda: check_machine(config, makes=processes.first))
    return config


def check_config(name: str, config: Any) -> None:
    """Raise UserError if the argument `name` is no config: in Python it may be anything."""
    if not isinstance(config, Config):
        kind: Any = type(config)
        made = {str: f"load_config({config!r})", dict: f"OPSDConfig(**{name})"}.get(kind)
        if kind is str and not config.endswith((".yaml", ".yml")):
            made = "load_config('mine.yaml') (OPSDTrainer takes a model, a config and rows)"
        raise UserError(
            f"{name} is of type {kind.__name__}: it must be an OPSDConfig, as "
            f"{made or 'OPSDConfig(steps=100, learning_rate=1e-5)'}"
        )


def check_arguments(config: Any, others: Mapping[str, Any]) -> None:
    """Raise UserError for an argument that `train` does not have, such as a field of the config."""
    for name, value in others.items():
        field = here(name, Config).partition(", ")[0]
        file = str(config) if isinstance(config, str | Path) else "mine.yaml"
        made = f"set it as in train(load_config({file!r}, ['{field}={value}']))"
        raise UserError(f"train has no argument {name!r}: {made if field else 'help(train)'}")


def check_machine(config: Config, makes: bool) -> None:
    """Raise UserError if this machine cannot do the run. makes: create the hub's repository."""
    for broken in _obstacles(config):
        raise refused(config, broken)
    check_packages(config, "anywhere")
    check_packages(config, "gpu")
    check_optimizer(config.train)
    if config.output.push_to_hub is not None:
        check_hub(config.output.push_to_hub, config.output.hub_private, makes)


def _obstacles(config: Config) -> Iterator[str]:
    """Yield what this machine lacks for the run, in the form that `refused` takes."""
    gpu = torch.cuda.is_available()
    if config.model.lora is not None:
        import_peft()
    if not gpu:
        check_without_gpu(config)
    if shows_images(config) and os.environ.get("WORLD_SIZE", "1") != "1":
        yield "data.columns: rows with images train in one process"
    if (backend := config.loss.backend) != "auto":
        usable = backends()
        reason = usable[backend]
        if reason is None and backend == "cpp" and gpu:
            reason = "it serves the CPU, and this run is on a GPU"
        if reason is not None:
            others = ", ".join(other for other, lacks in usable.items() if lacks is None)
            yield (
                f"loss.backend: it cannot run here ({reason}); 'auto' takes the fastest that can, "
                f"of {others}"
            )


PROBE = "Is 17 + 25 = 42?\nYes: é, 数, <|end|>."
LARGEST_SHARD = 50_000_000_000  # bytes of a file, in transformers' save_pretrained


def check_launcher(sharding: str, engine: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError if the way in which the run was launched does not fit its config."""
    told = environment.get
    if sharding != "none" and told("WORLD_SIZE", "1") == "1":
        raise UserError(
            f"train.sharding is {sharding!r}: there is one process; launch several, as with "
            "torchrun --nproc-per-node 2 -m opsd train …"
        )
    if engine == "vllm" and told("WORLD_SIZE", "1") != "1":
        raise UserError(
            f"rollout.engine is 'vllm': it shares the GPU of one process, and there are "
            f"{told('WORLD_SIZE')}; several use 'vllm_server'"
        )
    for name, ours in (("DeepSpeed", "zero1 (or zero2, zero3)"), ("FSDP", "fsdp2")):
        asked = told(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true"
        if asked and (name, sharding) != ("FSDP", "fsdp2"):
            raise UserError(
                f"accelerate launch was told to use {name}, train.sharding is {sharding!r}: set "
                f"train.sharding={ours}, and launch with --multi_gpu alone"
            )


def check_optimizer(train: TrainSection) -> None:
    """Raise UserError unless transformers can make train.optimizer here from its name alone."""
    name, known = train.optimizer, [kind.value for kind in OptimizerNames]
    if name not in known:
        hint = did_you_mean(name, known) or f"; known: {', '.join(known)}"
        raise UserError(f"train.optimizer is {name!r}: no optimizer of transformers{hint}")
    # The fields that transformers reads to make an optimizer. Real TrainingArguments would start
    # the communication between processes.
    asked: Any = SimpleNamespace(
        optim=name,
        optim_args=None,
        optim_target_modules=None,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        adam_beta1=train.beta1,
        adam_beta2=train.beta2,
        adam_epsilon=1e-8,
        gradient_accumulation_steps=1,
        warmup_steps=train.warmup_steps,
        parallel_mode=ParallelMode.NOT_DISTRIBUTED,
    )
    try:
        Trainer.get_optimizer_cls_and_kwargs(asked)
    except (ImportError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"train.optimizer is {name!r}: {first}") from None


def try_saving(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, keeps_base: bool
) -> None:
    """Write all that the run will save, with one entry of each full weight, and read it back with
    plain transformers and peft. Then reserve the disk space of the rest, and release it.

    keeps_base: the run also saves the model under its adapters.

    Raises UserError where the run could train but not save."""
    train, directory = config.train, Path(config.output.dir)
    everything = config.output.merge or keeps_base or not is_adapted(model)
    saved = [p for p in model.parameters() if everything or p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in saved)
    checkpoints = train.save_total_limit + 1 if train.save_every else 0
    each = checkpoint_bytes(model, train.sharding in STAGES)
    free, needed = shutil.disk_usage(directory).free, weights + each * checkpoints
    if free < needed:
        raise UserError(
            f"output.dir is {str(directory)!r}: {free / 1e9:.1f} GB are free there, "
            f"the run needs {needed / 1e9:.1f} GB"
        )
    try:
        with TemporaryDirectory(prefix=".trial-", suffix=".part", dir=directory) as place:
            save_model(model, tokenizer, Path(place), trial=True)
            _read_back(Path(place) / "model", config.model.trust_remote_code, tokenizer)
            # The model; and for each checkpoint the weights, and the optimizer's two moments.
            sizes = [min(weights, LARGEST_SHARD), *[each // 3, each * 2 // 3] * checkpoints]
            for number, size in enumerate(sizes):
                reserve(Path(place) / str(number), size)
    except Exception as error:
        if why := why_not_written(error):
            said = f"{why}, the run needs {needed / 1e9:.1f} GB there"
            raise UserError(f"output.dir is {str(directory)!r}: {said}") from error
        said = f"it could be trained but not saved ({in_short(error)})"
        raise UserError(f"model.path is {config.model.path!r}: {said}") from error


def _read_back(saved: Path, trust: bool, tokenizer: PreTrainedTokenizerBase) -> None:
    again = AutoTokenizer.from_pretrained(saved, trust_remote_code=trust)
    if again.chat_template != tokenizer.chat_template or again(PROBE) != tokenizer(PROBE):
        raise ValueError("its tokenizer is another one when it is read again")
    if (saved / ADAPTER).is_file():
        import_peft().PeftConfig.from_pretrained(saved)
        return
    AutoConfig.from_pretrained(saved, trust_remote_code=trust)
    GenerationConfig.from_pretrained(saved)
