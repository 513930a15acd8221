"""ZeRO by DeepSpeed: splits optimizer states, gradients and weights over the processes."""

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
    """accelerate's plugin for DeepSpeed. It leaves precision alone: weights and gradients are in
    fp32 and are exchanged in fp32."""
    _prepare()
    return DeepSpeedPlugin(hf_ds_config=deepspeed_config(train))


def deepspeed_config(train: TrainSection) -> dict[str, Any]:
    """The config in DeepSpeed's own format."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # used only in DeepSpeed's display
        "gradient_accumulation_steps": 1,  # our micro-batches are summed, not averaged
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": {
            "stage": STAGES[train.sharding],
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,  # in their own dtype
        },
        "torch_autocast": {
            "enabled": compute_dtype(train.precision) == torch.bfloat16,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # it would exchange their gradients in bf16
        },
    }


def _prepare() -> None:
    """Change settings of Python and torch before DeepSpeed exchanges or saves anything."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    # Python 3.11.0 to 3.11.3 pickle an enum member as a call of getattr, which `check_pieces`
    # refuses. Pickled by its value, every version reads it.
    copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))
    if not torch.cuda.is_available():
        from deepspeed import ops

        # On CPUs DeepSpeed would compile its own communication first; gloo is good enough.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # torch 2.13 warns about these in every exchange of DeepSpeed 0.19.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated")


def gathered(parameter: Tensor) -> Tensor:
    """Copy a whole weight that zero3 has split; all processes must call this."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def backward(engine, loss: Tensor) -> None:
    """Add the loss's gradients. A loss that is not finite makes all NaN, which refuses the step."""
    engine.backward(loss if loss.detach().isfinite() else loss * math.nan)


def step(engine) -> float:
    """Clip the gradient and update the weights, unless the gradient's norm is not finite. Returns
    the norm before clipping, inf if it was not finite."""
    engine.step()
    return math.inf if engine.optimizer.overflow else float(engine.get_global_grad_norm())


def close(engine) -> None:
    """Destroy the engine: the model is then saved and evaluated without it."""
    engine.destroy()
    unset_hf_deepspeed_config()  # or transformers would split every model loaded later
