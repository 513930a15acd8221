"""Translate train.precision into torch's dtypes."""

import torch


def best_precision(device: str | None = None) -> str:
    """The precision that `auto` means: bf16 if the processor multiplies bf16 natively, else fp32.
    On a CPU that has only AVX2, torch's bf16 products take 5 to 28 times as long as fp32's.

    device: cuda or cpu; None: the device that this machine trains on.
    """
    if device == "cuda":  # a plan for another machine: assume a GPU with bf16
        multiplies = True
    elif device is None and torch.cuda.is_available():
        multiplies = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # the same test as in opsd_kernels.gemm
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        multiplies = torch.backends.mkldnn.is_available() and any(
            getattr(torch.cpu, check, bool)() for check in checks
        )
    return "bf16" if multiplies else "fp32"


def compute_dtype(precision: str, device: str | None = None) -> torch.dtype:
    """The dtype of forward and backward. Weights that train stay in fp32."""
    if precision == "auto":
        precision = best_precision(device)
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context that runs matrix products in bf16 if `dtype` is bf16; else it changes nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def weights_dtype(precision: str, adapted: bool) -> torch.dtype:
    """The dtype to load the model's weights in: fp32 if they train; `compute_dtype` if they are
    frozen and adapters train."""
    return compute_dtype(precision) if adapted else torch.float32
