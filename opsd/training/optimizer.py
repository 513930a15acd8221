"""The optimizer and the schedule of a run, by transformers' own makers of both."""

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Names of weights that Trainer does not decay either."""


def make_optimizer(model: PreTrainedModel, arguments: TrainingArguments) -> Optimizer:
    """train.optimizer, over what trains. Biases and norms do not decay."""
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    decaying = set(get_parameter_names(model, [nn.LayerNorm], NO_DECAY))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for name, p in named if name in decaying],
            "weight_decay": arguments.weight_decay,
        },
        {"params": [p for name, p in named if name not in decaying], "weight_decay": 0.0},
    ]
    optimizer = kind(groups, **options)
    if "bitsandbytes" in kind.__module__ and options.get("optim_bits") == 8:
        _keep_embeddings(model)
    return optimizer


def _keep_embeddings(model: nn.Module) -> None:
    """Embeddings' moments stay in 32 bits, as bitsandbytes advises."""
    import bitsandbytes

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


def make_schedule(optimizer: Optimizer, arguments: TrainingArguments) -> LRScheduler:
    """The learning rate of each step, by train.schedule."""
    return get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=arguments.get_warmup_steps(arguments.max_steps),
        num_training_steps=arguments.max_steps,
    )
