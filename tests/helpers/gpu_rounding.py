"""Emulates a GPU's products on the CPU: operands rounded to 16 bits, computed and returned in
fp32.
"""

import pytest
import torch
from torch import Tensor

from opsd_kernels import gemm


def emulate_gpu_products(patch: pytest.MonkeyPatch) -> None:
    """Multiply 16-bit tensors on the CPU as a GPU does: operands are not widened, and a gradient is
    rounded to their dtype before it becomes an operand.
    """

    def product(a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype  # as a GPU's products require
        return a.float() @ b.float()

    low = (torch.bfloat16, torch.float16)
    patch.setattr(gemm, "widens", lambda x: False)
    patch.setattr(gemm, "narrows", lambda x: x.dtype in low)
    patch.setattr(gemm, "_set_product_", lambda out, a, b: out.copy_(product(a, b)))
    patch.setattr(gemm, "_add_product_", lambda out, a, b: out.add_(product(a, b)))
