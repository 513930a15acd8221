"""accelerate, set up for a run: DDP, FSDP2 or DeepSpeed around the model that trains."""

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
    """An Accelerator that splits as train.sharding says. Precision stays ours: fp32 weights,
    autocast in the step."""
    if train.sharding in deepspeed.STAGES:
        return Accelerator(mixed_precision="no", deepspeed_plugin=deepspeed.make_plugin(train))
    if train.sharding != "fsdp2":
        return Accelerator(mixed_precision="no")
    if not torch.cuda.is_available():
        # accelerate shards only processes that it believes to be on GPUs; gloo works on CPUs too.
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
    """Add the gradient of a micro-batch's loss, the sum over all processes."""
    loss = loss * accelerator.num_processes  # the wrappers take the mean over processes
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        deepspeed.backward(wrapped, loss)
    else:
        loss.backward()


def exchange(wrapped: nn.Module, last: bool) -> AbstractContextManager:
    """The context of a micro-batch's backward. DDP exchanges gradients once, in the last
    micro-batch. FSDP2 exchanges them in each: to wait would take memory for all of them. So does
    ZeRO, unless each process holds all gradients."""
    at_boundary: Any = getattr(wrapped, "set_gradient_accumulation_boundary", None)  # DeepSpeed's
    if at_boundary is not None:
        at_boundary(last)
    if last or not isinstance(wrapped, DistributedDataParallel):
        return nullcontext()
    return wrapped.no_sync()


def clip_gradient(accelerator: Accelerator, wrapped: nn.Module, longest: float) -> float:
    """Clip the gradient's norm; returns what it was. DeepSpeed clips within its step, which it
    takes now, unless the norm is not finite."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return deepspeed.step(wrapped)
    return float(accelerator.clip_grad_norm_(wrapped.parameters(), longest))


def gathered_weights(
    accelerator: Accelerator, wrapped: nn.Module, unsplit: nn.Module
) -> dict[str, Tensor]:
    """The weights that are split over processes, tied ones once, under the names of `unsplit`.

    All processes take part; the first alone gets them.
    """
    names = {name for name, _ in [*unsplit.named_parameters(), *unsplit.named_buffers()]}
    gathered = accelerator.get_state_dict(wrapped) or {}
    return {name: tensor for name, tensor in gathered.items() if name in names}


def called_through(wrapper: nn.Module, model: nn.Module, function: Callable[[], Result]) -> Result:
    """`function()`, as the forward of `model` in `wrapper`.

    DistributedDataParallel and FSDP2 do their work around the forward of what they wrap: they
    gather its weights and prepare to reduce its gradients. A function that uses the model's parts
    must run there. `wrapper` is `model` itself under FSDP2.
    """
    own = vars(model).get("forward")

    def restore() -> None:
        if own is None:
            vars(model).pop("forward", None)
        else:
            model.forward = own

    def forward() -> Result:
        restore()  # inside, the model is itself again
        return function()

    model.forward = forward
    try:
        return wrapper()
    finally:
        restore()
