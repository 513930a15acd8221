"""Fused linear divergence and log-probability of tensors, without logits in memory.

>>> import torch
>>> from opsd_kernels import linear_divergence
>>> student_hidden, teacher_hidden = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8)
>>> lm_head = torch.nn.Linear(8, 32, bias=False)
>>> loss = linear_divergence(student_hidden, teacher_hidden, lm_head.weight, divergence="jsd").loss
>>> loss.backward()
"""

from importlib.metadata import PackageNotFoundError, version

from opsd_kernels.divergence import Clip, Divergence, LogitTransform
from opsd_kernels.linear import LinearDivergence, linear_divergence
from opsd_kernels.log_prob import LinearLogProb, linear_log_prob
from opsd_kernels.resolve import backends

try:
    __version__ = version("opsd-train")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+source"

__all__ = [
    "Clip",
    "Divergence",
    "LinearDivergence",
    "LinearLogProb",
    "LogitTransform",
    "__version__",
    "backends",
    "linear_divergence",
    "linear_log_prob",
]
