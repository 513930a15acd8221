"""train.precision in torch's words."""

import torch


def best_precision(device: str | None = None) -> str:
    """What `auto` stands for: bf16 where the processor multiplies bf16, else fp32. torch's bf16
    products on a CPU with AVX2 alone take 5 to 28 times as long as those in fp32.

    device: cuda or cpu; none: what this machine trains on.
    """
    if device == "cuda":  # another machine's, in a plan
        multiplies = True
    elif device is None and torch.cuda.is_available():
        multiplies = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # the question that opsd_kernels.gemm asks too
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        multiplies = torch.backends.mkldnn.is_available() and any(
            getattr(torch.cpu, check, bool)() for check in checks
        )
    return "bf16" if multiplies else "fp32"


def compute_dtype(precision: str, device: str | None = None) -> torch.dtype:
    """What forward and backward run in. The weights that train stay in fp32."""
    if precision == "auto":
        precision = best_precision(device)
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context in which products run in `dtype`; in fp32 it changes nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def weights_dtype(precision: str, adapted: bool) -> torch.dtype:
    """What the model is loaded in: fp32 where its weights train; where adapters do, what the step
    computes in."""
    return compute_dtype(precision) if adapted else torch.float32
