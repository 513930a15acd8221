"""What the trainer hands to transformers' Trainer: our sections in its words, and a callback."""

from collections.abc import Callable

import torch
from accelerate import DistributedType, PartialState
from transformers import TrainerCallback, TrainingArguments

from opsd.config.config import Config
from opsd.distributed.deepspeed import deepspeed_config, prepare
from opsd.runs.log import RunLog

Evaluate = Callable[[int], dict]
"""step → the evaluation's record; runs the held-out problems and writes them down."""


class MissedEvaluation(TrainerCallback):
    """Evaluates a checkpoint that was written because its evaluation could not be done."""

    def __init__(self, evaluate: Evaluate, log: RunLog, every: int):
        self.evaluate, self.log, self.every = evaluate, log, every

    def on_train_begin(self, args, state, control, **_) -> None:
        """Where training goes on from such a checkpoint, whose weights have been loaded."""
        step = state.global_step
        due = step > 0 and self.every > 0 and step % self.every == 0
        if due and not self.log.is_evaluated(step):
            self.evaluate(step)


def training_arguments(config: Config, evaluates: bool, processes: int = 1) -> TrainingArguments:
    """Our sections in Trainer's words. Precision is ours: fp32 weights, autocast in the step."""
    train = config.train
    sharding = {"state_dict_type": "SHARDED_STATE_DICT"} if train.sharding == "fsdp2" else None
    schedule = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    arguments = TrainingArguments(
        output_dir=config.output.dir,
        max_steps=train.steps,
        per_device_train_batch_size=train.problems_per_step,
        learning_rate=train.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        adam_beta1=train.beta1,
        adam_beta2=train.beta2,
        max_grad_norm=train.max_grad_norm,
        optim=train.optimizer,
        seed=train.seed,
        data_seed=train.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates and config.eval.every else "no",
        eval_steps=config.eval.every or None,
        save_strategy="steps" if train.save_every else "no",
        save_steps=train.save_every or train.steps,
        save_total_limit=train.save_total_limit,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        report_to=config.output.report_to or "none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        fsdp=True if sharding else None,
        fsdp_config=sharding,
        deepspeed=deepspeed_config(config),
    )
    if arguments.deepspeed:
        prepare(arguments.device)
    if sharding and arguments.device.type == "cpu":
        # accelerate shards only where it takes the processes' devices for GPUs; gloo does on CPUs.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return arguments
