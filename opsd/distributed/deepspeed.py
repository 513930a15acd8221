"""ZeRO by DeepSpeed: optimizer, gradients and weights split over the processes."""

import copyreg
import math
import warnings
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from opsd.config.config import Config

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


def deepspeed_config(config: Config) -> dict[str, Any] | None:
    """What Trainer hands to DeepSpeed; None where the run does without it. Precision stays ours:
    fp32 weights and gradients, which are exchanged as such."""
    train = config.train
    if train.sharding not in STAGES:
        return None
    return {
        "train_micro_batch_size_per_gpu": "auto",  # for its own display only
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
            "enabled": train.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # whose gradients it would exchange in bf16
        },
    }


def prepare(device: torch.device) -> None:
    """Before DeepSpeed exchanges or saves anything."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    # Python 3.11.0 to 3.11.3 pickle an enum's member as a call of getattr, which `check_pieces`
    # must refuse; by its value any version reads it.
    copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))
    if device.type == "cpu":
        from deepspeed import ops

        # For CPUs it would first compile an exchange of its own; gloo does.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed 0.19 has torch 2.13 warn of these in every exchange.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated")


def gathered(parameter: Tensor) -> Tensor:
    """A copy of the whole of a weight that zero3 has split; all processes must ask for it."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


class LateSteps(TrainerCallback):
    """Has DeepSpeed step where other optimizers do: once the step's loss and gradients are known.

    accelerate has it step in the last backward, before Trainer asks for the gradients' norm.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def on_train_begin(self, args, state, control, **_) -> None:
        """When Trainer has made the engine."""
        wrapper = self.accelerator.deepspeed_engine_wrapped
        self.accelerator.deepspeed_engine_wrapped = LateStep(wrapper.engine)

    def on_train_end(self, args, state, control, **_) -> None:
        """The model is saved and evaluated without it."""
        self.accelerator.deepspeed_engine_wrapped.engine.destroy()
        unset_hf_deepspeed_config()  # or transformers would split what is loaded from here on


class LateStep(DeepSpeedEngineWrapper):
    """accelerate's access to the engine. It clips and steps when its gradients' norm is asked for;
    where that is not finite it leaves the weights as they are, and returns inf."""

    _waiting = False  # gradients that no step has used

    def backward(self, loss: Tensor, sync_gradients: bool = True, **_) -> None:
        """Adds up gradients; a loss that is not finite spoils them all, so that the step is refused
        whatever its gradient is."""
        self._waiting = True
        self.engine.backward(loss if loss.detach().isfinite() else loss * math.nan)

    def get_global_grad_norm(self) -> float:
        """Of the gradients of the step, which it takes, or of the last one."""
        if self._waiting:
            self.engine.step()
            self._waiting = False
        return math.inf if self.engine.optimizer.overflow else float(super().get_global_grad_norm())
