"""Translate train.precision into torch's dtypes."""

import functools
import timeit

import torch


def best_precision(device: str | None = None) -> str:
    """The precision that `auto` means: bf16 where its products are fast, else fp32.

    device: cuda or cpu; None: the device that this machine trains on.
    """
    if device == "cuda":  # a plan for another machine: assume a GPU with bf16
        return "bf16"
    if device is None and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # the same test as in opsd_kernels.gemm; with AVX2 bf16 takes 5 to 28 times as long
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        fast = torch.backends.mkldnn.is_available() and any(
            getattr(torch.cpu, check, bool)() for check in checks
        )
        fast = fast and _bf16_is_faster()
    return "bf16" if fast else "fp32"


@functools.cache
def _bf16_is_faster() -> bool:
    """Whether this CPU's bf16 products take less time than its fp32 ones, by a measurement of some
    10 ms. AMX is 4 to 5 times as fast, AMD's AVX-512 twice; Intel's AVX-512 without AMX, which a
    virtual machine may hide, takes twice as long.
    """
    square = torch.ones(512, 512)
    bf16, fp32 = (
        min(timeit.repeat("x @ x", globals={"x": x}, number=1, repeat=6))
        for x in (square.bfloat16(), square)
    )
    return bf16 < fp32


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
