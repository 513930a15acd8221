"""The products of a GPU on the CPU: operands rounded to 16 bits, fp32 within and out."""

import pytest
import torch
from torch import Tensor

from opsd_kernels import gemm


def emulate_gpu_products(patch: pytest.MonkeyPatch) -> None:
    """From here on 16-bit tensors on the CPU are multiplied as on a GPU: operands stay as they are,
    and a gradient is rounded to their dtype before it becomes one.
    """

    def product(a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype  # a GPU's product has no others
        return a.float() @ b.float()

    low = (torch.bfloat16, torch.float16)
    patch.setattr(gemm, "widens", lambda x: False)
    patch.setattr(gemm, "narrows", lambda x: x.dtype in low)
    patch.setattr(gemm, "_set_product_", lambda out, a, b: out.copy_(product(a, b)))
    patch.setattr(gemm, "_add_product_", lambda out, a, b: out.add_(product(a, b)))
