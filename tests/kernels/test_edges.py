"""Where formulas break: zeros, infinities, NaN, huge logits, nothing at all."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers.kernel_cases import BACKENDS, KINDS, check, make

from opsd_kernels import Divergence, linear_divergence, linear_log_prob, plan, reference

INFINITE = (("forward_kl", "student"), ("reverse_kl", "teacher"))


@pytest.fixture(autouse=True, params=[None, 5000], ids=["default", "tiles"])
def small_memory(request, monkeypatch):
    """Every edge in both algorithms: so small a budget makes tiles of what has more than 64
    entries.
    """
    if request.param is not None:
        monkeypatch.setattr(plan, "DEFAULT_BUDGET", request.param)


@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
class TestEdges:
    def test_identical_rows_are_exactly_zero(self, backend, divergence):
        case = make(9, 1031, 16, divergence=divergence, reduction="none").require_grad()
        result = linear_divergence(
            case.student,
            case.student.detach(),
            case.weight,
            divergence=case.divergence,
            beta=case.beta,
            backend=backend,
            reduction="none",
        )
        assert torch.equal(result.loss, torch.zeros(9))
        result.loss.sum().backward()
        assert not case.student.grad.any() and not case.weight.grad.any()

    def test_padded_vocabulary(self, backend, divergence):
        """Logits of -inf in both roles count for nothing."""
        case = make(6, 245, 8, divergence=divergence).require_grad()
        bias = torch.zeros(245)
        bias[140:] = -torch.inf  # a whole tile of them, too
        padded = linear_divergence(
            case.student,
            case.teacher,
            case.weight,
            bias=bias,
            divergence=case.divergence,
            beta=case.beta,
            backend=backend,
        )
        g_padded = torch.autograd.grad(padded.loss, (case.student, case.weight))
        short = replace(case, weight=case.weight[:140]).fused(backend)
        for name in ("loss", "student_entropy", "teacher_entropy"):
            torch.testing.assert_close(getattr(padded, name), getattr(short, name))
        for x, y in zip(
            g_padded, torch.autograd.grad(short.loss, (case.student, case.weight)), strict=True
        ):
            torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("role", ["student", "teacher"])
    def test_entries_that_one_role_rules_out(self, backend, divergence, role):
        """As in fp64: an infinite divergence where the other role gives them probability, and in
        the gradient no NaN that is not there."""
        case = make(4, 300, 8, divergence=divergence).require_grad()
        exact = case.to(torch.float64).require_grad()
        bias = torch.zeros(300)
        bias[200:] = -torch.inf
        biases = [bias, torch.zeros(300)][:: 1 if role == "student" else -1]
        loss = linear_divergence(
            *(case.student, case.teacher, case.weight),
            **dict(zip(("bias", "teacher_bias"), biases, strict=True)),
            divergence=case.divergence,
            beta=case.beta,
            backend=backend,
        ).loss
        truth = reference.linear_divergence(
            *(exact.student, exact.teacher, exact.weight, exact.weight),
            **{n: b.double() for n, b in zip(("bias", "teacher_bias"), biases, strict=True)},
            divergence=Divergence(case.divergence, case.beta),
        )
        assert truth.isinf() == ((divergence, role) in INFINITE)
        torch.testing.assert_close(loss.double(), truth)
        for x, y in zip(
            torch.autograd.grad(loss, (case.student, case.weight)),
            torch.autograd.grad(truth, (exact.student, exact.weight)),
            strict=True,
        ):
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-6, equal_nan=True)

    def test_huge_logits(self, backend, divergence):
        """+-1e4, from integers, so that the logits are exact in fp32 and only the statistics can
        err.
        """
        case = make(8, 300, 4, divergence=divergence)
        case.student[:] = torch.randint(-40, 40, (8, 4))
        case.teacher[:] = case.student + torch.randint(-1, 2, (8, 4))
        case.weight[:] = torch.randint(-70, 70, (300, 4))
        assert (case.student @ case.weight.T).abs().max() > 5e3
        check(case, torch.float32, backend)

    def test_weightless_tokens_leak_nothing(self, backend, divergence):
        for reduction in ("mean", "sum", "none"):
            case = make(7, 233, 8, divergence=divergence, reduction=reduction)
            case.student[2], case.teacher[5] = torch.nan, torch.inf
            case = case.__class__(
                **{**vars(case), "token_weight": torch.tensor([1.0, 0.5, 0, 1, 2, 0, 1])}
            ).require_grad()
            result = case.fused(backend)
            result.loss.sum().backward()
            assert result.loss.isfinite().all() and result.per_token.isfinite().all()
            assert case.weight.grad.isfinite().all() and case.student.grad.isfinite().all()
            assert not case.student.grad[[2, 5]].any() and not result.per_token[[2, 5]].any()

    def test_nan_in_a_token_that_counts_is_seen(self, backend, divergence):
        case = make(4, 233, 8, divergence=divergence)
        case.student[1, 3] = torch.nan
        per_token = case.fused(backend).per_token
        assert per_token[1].isnan() and per_token[[0, 2, 3]].isfinite().all()

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_nothing_to_do(self, backend, divergence, reduction):
        all_zero = make(
            5, 233, 8, divergence=divergence, reduction=reduction, token_weight=torch.zeros(5)
        )
        empty = make(0, 233, 8, divergence=divergence, reduction=reduction)
        for case in (all_zero.require_grad(), empty.require_grad()):
            loss = case.fused(backend).loss
            assert torch.equal(loss, torch.zeros_like(loss))
            loss.sum().backward()
            assert not case.student.grad.any() and not case.weight.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_shape_and_strides(backend):
    """[..., D] inputs, transposed weights and an expanded upstream gradient give what plain ones
    do.
    """
    flat = make(12, 250, 8, reduction="none").require_grad()
    expected = flat.fused(backend)
    expected.loss.sum().backward()
    student = flat.student.detach().reshape(3, 4, 8).transpose(0, 1).contiguous().transpose(0, 1)
    weight = flat.weight.detach().T.contiguous().T
    student.requires_grad_()
    weight.requires_grad_()
    assert not student.is_contiguous() and not weight.is_contiguous()
    result = linear_divergence(
        student, flat.teacher.reshape(3, 4, 8), weight, reduction="none", backend=backend
    )
    assert result.loss.shape == result.per_token.shape == (3, 4)
    result.loss.backward(torch.ones(()).expand(3, 4))
    torch.testing.assert_close(result.loss.flatten(), expected.loss)
    torch.testing.assert_close(student.grad.reshape(12, 8), flat.student.grad)
    torch.testing.assert_close(weight.grad, flat.weight.grad)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_column_of_weights(backend, reduction):
    """Token weights with a stride, none of them 0."""
    case, weights = make(7, 130, 8), torch.rand(7, 2) + 0.5
    options = {"backend": backend, "reduction": reduction}

    def divergence(hidden, column):
        made = linear_divergence(hidden, case.teacher, case.weight, token_weight=column, **options)
        return made.loss

    def log_prob(hidden, column):
        targets = torch.arange(7)
        made = linear_log_prob(hidden, case.weight, targets, token_weight=column, **options)
        return made.log_prob

    for fused in (divergence, log_prob):
        made = []
        for column in (weights[:, 1], weights[:, 1].contiguous()):
            hidden = case.student.clone().requires_grad_()
            loss = fused(hidden, column)
            made.append((loss, *torch.autograd.grad(loss.sum(), hidden)))
        assert all(map(torch.equal, *made))


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_prob_of_nothing(backend):
    hidden = torch.zeros(0, 8, requires_grad=True)
    weight = torch.randn(211, 8, requires_grad=True)
    result = linear_log_prob(hidden, weight, torch.zeros(0, dtype=torch.long), backend=backend)
    result.log_prob.sum().backward()
    assert result.log_prob.shape == (0,) and not weight.grad.any()


def test_meta_tensors_give_shapes():
    """A model's loss may be traced before it has weights; a meta device has no autocast to ask."""
    hidden, weight = (torch.randn(n, 3, device="meta").requires_grad_() for n in (5, 7))
    linear_divergence(hidden, hidden.detach(), weight, weight.detach()).loss.backward()
    linear_log_prob(hidden, weight, torch.zeros(5, dtype=torch.long, device="meta"))
    assert hidden.grad.shape == (5, 3) and weight.grad.device.type == "meta"


def test_a_result_taken_for_its_loss_is_told_where_it_is():
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(20, 8)
    result = linear_divergence(hidden, torch.randn(3, 8), weight)
    with pytest.raises(AttributeError, match=r"no attribute 'backward'.*: \.loss\.backward"):
        result.backward()
    with pytest.raises(AttributeError, match=r"no attribute 'los'$"):
        _ = result.los
    copy.deepcopy(linear_divergence(torch.randn(3, 8), torch.randn(3, 8), weight)).loss.item()
