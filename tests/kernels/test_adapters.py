"""Other libraries' calls: each gives what that library gives, in its own convention."""

import pytest
import torch
from helpers.kernel_cases import make
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from torch.testing import assert_close
from trl.trainer import distillation_trainer

from opsd_kernels.adapters import divergence_of
from opsd_kernels.adapters.liger import FusedLinearJSDLoss
from opsd_kernels.adapters.trl import chunked_divergence_loss


def test_their_number_for_the_divergence():
    assert divergence_of(0) == {"divergence": "forward_kl"}
    assert divergence_of(1.0) == {"divergence": "reverse_kl"}
    assert divergence_of(0.3) == {"divergence": "jsd", "beta": 0.3}
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"beta: got .*0 .forward KL. and 1 .reverse KL"):
            divergence_of(wrong)


def liger_problem(shared: bool, biased: bool):
    case = make(11, 90, 8, bias=biased)
    teacher_weight = case.weight if shared else torch.randn(90, 12)
    teacher = case.teacher if shared else torch.randn(11, 12)
    labels = torch.randint(0, 90, (11,))
    labels[[2, 7]] = -100
    return case, teacher, teacher_weight, torch.randn(90) if biased else None, labels


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shared, biased", [(True, False), (False, True)])
def test_liger(beta, shared, biased):
    """Loss, both parts and all gradients of Liger's own module."""
    case, teacher, teacher_weight, teacher_bias, labels = liger_problem(shared, biased)
    options = {"beta": beta, "temperature": 1.7, "return_soft_hard_loss": True}
    options |= {"weight_hard_loss": 0.3, "weight_soft_loss": 0.9}
    found = []
    for module in (
        LigerFusedLinearJSDLoss(**options, compiled=False),
        FusedLinearJSDLoss(**options),
    ):
        c = case.require_grad()
        head = c.weight if shared else teacher_weight
        parts = module(c.student, c.weight, teacher, head, labels, c.bias, teacher_bias)
        parts[0].backward(torch.tensor(2.0))
        found.append((*parts, *(x.grad for x in c.trainable())))
    for theirs, ours in zip(*found, strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    # The soft part alone, without the other's products.
    soft = FusedLinearJSDLoss(0.0, 1.0, beta, -100, 1.7, backend="torch")
    loss = soft(case.student, case.weight, teacher, teacher_weight, labels, case.bias, teacher_bias)
    assert_close(loss, found[0][1], rtol=1e-4, atol=1e-5)


def test_liger_without_a_token():
    case, teacher, teacher_weight, _, labels = liger_problem(True, False)
    case = case.require_grad()
    loss = FusedLinearJSDLoss()(
        case.student, case.weight, teacher, teacher_weight, torch.full_like(labels, -100)
    )
    loss.backward()
    assert loss == 0 and not case.weight.grad.any()


def test_what_liger_has_and_we_have_not_is_refused():
    with pytest.raises(TypeError, match="chunk_size"):
        FusedLinearJSDLoss(chunk_size=64)
    case, teacher, _, _, labels = liger_problem(True, False)
    with pytest.raises(ValueError, match=r"teacher_weight: got .*one vocabulary"):
        FusedLinearJSDLoss()(
            case.student, case.weight, teacher, torch.randn(95, teacher.shape[1]), labels
        )


@pytest.mark.parametrize("items", [None, 5, torch.tensor(5)], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_trl_chunked_divergence_loss(beta, items):
    """TRL's own function, argument for argument: [B, K, D], a mask, scales, soft caps, biases."""
    case, teacher = make(12, 90, 8, bias=True), torch.randn(3, 4, 16)
    teacher_weight, teacher_bias = torch.randn(90, 16), torch.randn(90)
    mask = (torch.arange(12).view(3, 4) % 5 != 1).long()
    found, caps = [], (6.0, 4.0)
    for function in (distillation_trainer._chunked_divergence_loss, chunked_divergence_loss):
        c = case.require_grad()
        arguments = (c.student.view(3, 4, 8), teacher, c.weight, teacher_weight, mask, beta, items)
        loss, entropy, number = function(
            *arguments, c.bias, teacher_bias, 0.5, 0.8, 6.0, caps[items is None], temperature=1.3
        )
        loss.backward()
        found.append((loss, entropy, number, *(x.grad for x in c.trainable())))
    for theirs, ours in zip(*found, strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_trl_with_one_head_for_both_and_low_precision():
    """The same head object, without its copy; bf16 states and an fp32 head, as under autocast."""
    case = make(12, 90, 8)
    low, mask = case.student.bfloat16().view(3, 4, 8), torch.ones(3, 4)
    calls = (low, case.teacher.bfloat16().view(3, 4, 8), case.weight, case.weight, mask, 0.5)
    theirs, *_ = distillation_trainer._chunked_divergence_loss(*calls)
    ours, *_ = chunked_divergence_loss(*calls)
    assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    nothing = chunked_divergence_loss(*calls[:4], torch.zeros(3, 4), 0.5)
    assert nothing[0] == 0 and nothing[2] == 0
