"""Makes a run's optimizer and learning-rate schedule with transformers' functions."""

import math
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from opsd.config.sections import OutputSection, TrainSection
from opsd.distributed.processes import Processes

NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Patterns of weights without weight decay, as in transformers' Trainer."""


def training_arguments(
    train: TrainSection, output: OutputSection, evaluate_every: int, varied: bool
) -> TrainingArguments:
    """Convert the config to transformers' TrainingArguments, which callbacks and optimizers read.
    Precision and sharding are left out: distributed.wrap and step handle them. varied: whether
    problems of data.varied hold the student."""
    schedule = train.schedule or ("linear" if varied else "constant")
    return TrainingArguments(
        output_dir=output.dir,
        max_steps=train.steps,
        per_device_train_batch_size=train.problems_per_step,
        learning_rate=train.learning_rate,
        lr_scheduler_type="constant_with_warmup" if schedule == "constant" else schedule,
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
        run_name=output.run_name or Path(output.dir).resolve().name,
        project=output.project,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )


def make_optimizer(model: PreTrainedModel, arguments: TrainingArguments) -> Optimizer:
    """Make train.optimizer for the trainable weights. Biases and norms get no weight decay."""
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    decaying = set(get_parameter_names(model, [nn.LayerNorm], NO_DECAY))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if (name in decaying) == decays], "weight_decay": rate}
        for decays, rate in ((True, arguments.weight_decay), (False, 0.0))
    ]
    optimizer = kind(groups, **options)
    if "bitsandbytes" in kind.__module__ and options.get("optim_bits") == 8:
        import bitsandbytes

        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):  # moments in 32 bits, as bitsandbytes advises
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


class Movement:
    """Tells whether the weights still are as the run began, but for rounding."""

    def __init__(self, optimizer: Optimizer, warmup: int, looks: bool):
        self.optimizer, self.warmup, self.looks = optimizer, warmup, looks
        self.start = self._entries() if looks else []

    def __call__(self, step: int, processes: Processes) -> bool:
        """Whether they still are after this step, which is one after the warm-up."""
        if self.looks:
            now = self._entries()
            far = math.dist(now, self.start) > 1e-8 * math.hypot(*now)
            self.looks = not any(processes.everywhere(lambda: far))
        return self.looks and step > self.warmup

    def _entries(self) -> list[float]:
        """One entry of each weight that trains, of the part that this process has."""
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        parts = [getattr(one, "_local_tensor", one).detach().reshape(-1) for one in weights]
        chosen = [part[len(part) // 2].float() for part in parts if len(part)]
        return torch.stack(chosen).tolist() if chosen else []  # one wait for a GPU


def make_schedule(optimizer: Optimizer, arguments: TrainingArguments) -> LRScheduler:
    """Make the learning-rate schedule train.schedule."""
    return get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=arguments.get_warmup_steps(arguments.max_steps),
        num_training_steps=arguments.max_steps,
    )
