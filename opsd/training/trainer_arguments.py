"""The config as transformers' TrainingArguments, which callbacks and optimizers read."""

import torch
from transformers import TrainingArguments

from opsd.config.sections import OutputSection, TrainSection


def training_arguments(
    train: TrainSection, output: OutputSection, evaluate_every: int
) -> TrainingArguments:
    """Without precision and sharding, which are ours: see distributed.wrap and step."""
    schedule = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    return TrainingArguments(
        output_dir=output.dir,
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
        eval_strategy="steps" if evaluate_every else "no",
        eval_steps=evaluate_every or None,
        save_strategy="steps" if train.save_every else "no",
        save_steps=train.save_every or train.steps,
        save_total_limit=train.save_total_limit,
        report_to=[*map(str, output.report_to)] or "none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
