"""train.precision in torch's words."""

import torch


def compute_dtype(precision: str) -> torch.dtype:
    """What forward and backward run in. The weights that train stay in fp32."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context in which products run in `dtype`; in fp32 it changes nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def weights_dtype(precision: str, adapted: bool) -> torch.dtype:
    """What the model is loaded in: fp32 where its weights train; where adapters do, what the step
    computes in."""
    return compute_dtype(precision) if adapted else torch.float32
