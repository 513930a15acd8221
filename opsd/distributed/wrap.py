"""Sets up accelerate for a run: wraps the trained model in DDP, FSDP2 or DeepSpeed."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from opsd.common.precision import compute_dtype
from opsd.config.sections import TrainSection
from opsd.distributed import deepspeed

Result = TypeVar("Result")


def make_accelerator(train: TrainSection) -> Accelerator:
    """Make an Accelerator for train.sharding. It leaves precision alone: weights are in fp32, and
    the training step uses autocast."""
    if train.sharding in deepspeed.STAGES:
        return Accelerator(mixed_precision="no", deepspeed_plugin=deepspeed.make_plugin(train))
    if train.sharding != "fsdp2":
        return Accelerator(mixed_precision="no")
    if not torch.cuda.is_available():
        # accelerate shards only if it believes to be on GPUs, but gloo can do it on CPUs too.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    policy = None
    if compute_dtype(train.precision) == torch.bfloat16:
        # Weights are gathered in bf16; gradients are summed in fp32.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
        mixed_precision_policy=policy,
    )
    return Accelerator(mixed_precision="no", fsdp_plugin=plugin)


def backward(accelerator: Accelerator, wrapped: nn.Module, loss: Tensor) -> None:
    """Add the gradient of a micro-batch's loss, summed over all processes."""
    loss = loss * accelerator.num_processes  # the wrappers average gradients over processes
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        deepspeed.backward(wrapped, loss)
    else:
        loss.backward()


def exchange(wrapped: nn.Module, last: bool) -> AbstractContextManager:
    """The context for a micro-batch's backward. DDP exchanges gradients only in the last
    micro-batch. FSDP2 does so in each one: waiting would need memory for all gradients. So does
    ZeRO, unless each process holds all gradients."""
    at_boundary: Any = getattr(wrapped, "set_gradient_accumulation_boundary", None)  # DeepSpeed's
    if at_boundary is not None:
        at_boundary(last)
    if last or not isinstance(wrapped, DistributedDataParallel):
        return nullcontext()
    return wrapped.no_sync()


def clip_gradient(accelerator: Accelerator, wrapped: nn.Module, longest: float) -> float:
    """Clip the gradient and return its norm before. DeepSpeed clips in its optimizer step, so this
    takes that step now, unless the norm is not finite."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return deepspeed.step(wrapped)
    return float(accelerator.clip_grad_norm_(wrapped.parameters(), longest))


def gathered_weights(
    accelerator: Accelerator, wrapped: nn.Module, unsplit: nn.Module
) -> dict[str, Tensor]:
    """Gather weights that are split over processes, with the names in `unsplit`; tied ones once.

    All processes must call this; only the first gets the weights, the others {}.
    """
    names = {name for name, _ in [*unsplit.named_parameters(), *unsplit.named_buffers()]}
    gathered = accelerator.get_state_dict(wrapped) or {}
    return {name: tensor for name, tensor in gathered.items() if name in names}


def called_through(wrapper: nn.Module, model: nn.Module, function: Callable[[], Result]) -> Result:
    """Call `function()` inside the forward of `wrapper`, which wraps `model`.

    DistributedDataParallel and FSDP2 hook into the forward of what they wrap: they gather its
    weights and prepare to reduce its gradients. A function that uses the model's parts must run
    inside. Under FSDP2 `wrapper` is `model` itself.
    """
    own = vars(model).get("forward")

    def restore() -> None:
        if own is None:
            vars(model).pop("forward", None)
        else:
            model.forward = own

    def forward() -> Result:
        restore()  # the function may call the model's real forward
        return function()

    model.forward = forward
    try:
        return wrapper()
    finally:
        restore()
