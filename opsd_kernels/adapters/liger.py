"""`FusedLinearJSDLoss`: has the interface and results of Liger's LigerFusedLinearJSDLoss
(liger_kernel.chunked_loss 0.8.5).

It does not have `compiled` and `chunk_size`, which mean nothing to these kernels (`memory_budget`
does), nor a teacher with a larger vocabulary, for which Liger sets the student's logits to 0.
"""

from typing import Any

import torch
from torch import Tensor

from opsd_kernels import linear_divergence, linear_log_prob
from opsd_kernels.adapters import divergence_of


class FusedLinearJSDLoss(torch.nn.Module):
    """weight_hard_loss * cross-entropy + weight_soft_loss * divergence, each the mean over tokens
    whose label is not `ignore_index` (0 if there are none).

    beta: 0 forward KL, 1 reverse KL, between them JSD with that share of the teacher. temperature:
    only of the divergence. A loss of weight 0 costs nothing. The cross-entropy has its own matrix
    products, 6 N V D with a trained head.

    >>> loss = FusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    >>> student, teacher, head = torch.zeros(3, 4), torch.ones(3, 4), torch.eye(5, 4)
    >>> loss(student, head, teacher, head, torch.tensor([0, 1, -100]))
    tensor(0.0509)
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        *,
        return_soft_hard_loss: bool = False,
        memory_budget: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.weight_hard_loss, self.weight_soft_loss = weight_hard_loss, weight_soft_loss
        self.divergence, self.temperature = divergence_of(beta), temperature
        self.ignore_index, self.return_soft_hard_loss = ignore_index, return_soft_hard_loss
        self.options: dict[str, Any] = {"memory_budget": memory_budget, "backend": backend}

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss; with `return_soft_hard_loss` (loss, soft, hard), the last two detached.

        student_input [N, D], student_weight [V, D], teacher_input [N, D_t], teacher_weight [V,
        D_t], true_labels [N], biases [V]. The teacher has no bias unless `teacher_bias` is given.
        """
        counts = (true_labels != self.ignore_index).float()
        zero = student_input.new_zeros((), dtype=torch.float32)
        soft = hard = zero
        if self.weight_soft_loss != 0 or self.return_soft_hard_loss:
            shared = teacher_weight is student_weight and teacher_bias is student_bias
            soft = linear_divergence(
                student_input,
                teacher_input,
                student_weight,
                None if shared else teacher_weight,
                bias=student_bias,
                teacher_bias=teacher_bias,
                temperature=self.temperature,
                token_weight=counts,
                **self.divergence,
                **self.options,
            ).loss
        if self.weight_hard_loss != 0 or self.return_soft_hard_loss:
            hard = -linear_log_prob(
                student_input,
                student_weight,
                true_labels,
                bias=student_bias,
                token_weight=counts,
                reduction="mean",
                **self.options,
            ).log_prob
        loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss
