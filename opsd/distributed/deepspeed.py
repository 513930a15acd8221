"""ZeRO by DeepSpeed: optimizer, gradients and weights split over the processes."""

import copyreg
import math
import warnings
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from opsd.common.precision import compute_dtype
from opsd.config.sections import TrainSection

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


def make_plugin(train: TrainSection) -> DeepSpeedPlugin:
    """accelerate's settings for DeepSpeed. Precision is left to us: weights and gradients are in
    fp32 and are exchanged in fp32."""
    _prepare()
    return DeepSpeedPlugin(hf_ds_config=deepspeed_config(train))


def deepspeed_config(train: TrainSection) -> dict[str, Any]:
    """DeepSpeed's own config."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # for its own display only
        "gradient_accumulation_steps": 1,  # micro-batches' losses are summed already
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": {
            "stage": STAGES[train.sharding],
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,  # in the dtype that they have
        },
        "torch_autocast": {
            "enabled": compute_dtype(train.precision) == torch.bfloat16,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # whose gradients it would exchange in bf16
        },
    }


def _prepare() -> None:
    """Settings that must be made before DeepSpeed exchanges or saves anything."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    # Python 3.11.0 to 3.11.3 pickle an enum's member as a call of getattr, which `check_pieces`
    # must refuse; by its value any version reads it.
    copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))
    if not torch.cuda.is_available():
        from deepspeed import ops

        # On CPUs it would first compile its own communication; gloo is good enough.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed 0.19 has torch 2.13 warn of these in every exchange.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated")


def gathered(parameter: Tensor) -> Tensor:
    """A copy of the whole of a weight that zero3 has split; all processes must ask for it."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def backward(engine, loss: Tensor) -> None:
    """Add up gradients. A loss that is not finite spoils them all, so that the step is refused
    whatever its gradient is."""
    engine.backward(loss if loss.detach().isfinite() else loss * math.nan)


def step(engine) -> float:
    """Clip the gradient, and update the weights unless its norm is not finite; returns the norm."""
    engine.step()
    return math.inf if engine.optimizer.overflow else float(engine.get_global_grad_norm())


def close(engine) -> None:
    """Let go of the engine: the model is saved and evaluated without it."""
    engine.destroy()
    unset_hf_deepspeed_config()  # or transformers would split every model loaded later
