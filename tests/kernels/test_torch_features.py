"""The operators inside torch: compile, autocast, checkpoint, repeated backward, opcheck."""

import pytest
import torch
from helpers.kernel_cases import BACKENDS, DEVICES, make
from torch.utils.checkpoint import checkpoint

from opsd_kernels import linear, linear_divergence, linear_log_prob, log_prob


def problem():
    case = make(10, 60, 8).require_grad()
    return case.student, case.teacher, case.weight


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint_and_repeated_backward(backend, reduction):
    student, teacher, weight = problem()

    def loss(s, t, w):
        return 3 * linear_divergence(s, t, w, reduction=reduction, backend=backend).loss.sum()

    first = loss(student, teacher, weight)
    expected = torch.autograd.grad(first, (student, weight), retain_graph=True)
    kept = [g.clone() for g in expected]
    for again in (
        gradients(first, student, weight),  # the graph's second walk
        gradients(checkpoint(loss, student, teacher, weight, use_reentrant=False), student, weight),
    ):
        for x, y, z in zip(again, expected, kept, strict=True):
            assert torch.equal(x, y) and torch.equal(y, z)


def test_accumulated_gradients_are_not_aliased():
    """Backward hands over the tensor it saved: a second call must not write into the first's."""
    student, teacher, weight = problem()
    linear_divergence(student, teacher, weight).loss.backward()
    first = weight.grad.clone()
    linear_divergence(student, teacher, weight).loss.backward()
    torch.testing.assert_close(weight.grad, 2 * first)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(reduction, device):
    """As one graph; the second call makes its sizes, temperature and budget symbols."""

    def loss(s, t, w, token_weight, temperature, budget):
        result = linear_divergence(
            s,
            t,
            w,
            token_weight=token_weight,
            temperature=temperature,
            reduction=reduction,
            memory_budget=budget,
        )
        return result.loss.square().sum() + 0 * result.student_entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n, *numbers in ((10, 1.0, 10**6), (13, 1.3, 2 * 10**6)):
        case = make(n, 60, 8).require_grad()
        inputs = (case.student, case.teacher, case.weight, torch.rand(n), *numbers)
        for x, y in zip(
            gradients(compiled(*inputs), case.student, case.weight),
            gradients(loss(*inputs), case.student, case.weight),
            strict=True,
        ):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("device", DEVICES)
def test_compile_log_prob(device):
    student, _, weight = problem()
    targets = torch.randint(0, 60, (10,))

    def loss(s, w):
        return linear_log_prob(s, w, targets).log_prob.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(
        gradients(compiled(student, weight), student, weight),
        gradients(loss(student, weight), student, weight),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


def test_autocast_on_the_cpu_keeps_the_operands():
    """fp32 masters with bf16 hidden states, as a model under autocast gives them: fp32 products."""
    student, teacher, weight = problem()
    low = student.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_divergence(low, teacher.bfloat16(), weight).loss
    wide = low.detach().float().requires_grad_()
    expected = linear_divergence(wide, teacher.bfloat16().float(), weight).loss
    assert torch.equal(loss, expected) and loss.dtype == torch.float32
    (d_low,), (d_wide,) = gradients(loss, low), gradients(expected, wide)
    assert torch.equal(d_low, d_wide.bfloat16())


def test_no_grad_computes_no_gradient():
    student, teacher, weight = problem()
    with torch.no_grad():
        result = linear_divergence(student, teacher, weight)
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.loss, linear_divergence(student, teacher, weight).loss)


def test_double_backward_is_refused():
    student, teacher, weight = problem()
    loss = linear_divergence(student, teacher, weight).loss
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_forward_mode_is_refused():
    """Its derivative would silently be 0."""
    student, teacher, weight = (x.detach() for x in problem())
    targets, tangent = torch.arange(10), torch.ones_like(student)
    for function in (
        lambda x: linear_divergence(x, teacher, weight).loss,
        lambda x: linear_divergence(student, x, weight).loss,
        lambda x: linear_log_prob(x, weight, targets).log_prob.sum(),
    ):
        with pytest.raises(RuntimeError, match=r"hidden: has a forward-mode tangent.*jvp"):
            torch.func.jvp(function, (student,), (tangent,))
        with pytest.raises(RuntimeError, match="forward-mode"):
            torch.func.jacfwd(function)(student)
        with torch.autograd.forward_ad.dual_level():
            function(student)  # of which nobody wants one
            with pytest.raises(RuntimeError, match="forward-mode"):
                function(torch.autograd.forward_ad.make_dual(student, tangent))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, per_token):
    student, teacher, weight = problem()
    options = linear.Options(
        drop_zeros=True,
        want_hidden=True,
        want_weight=True,
        want_bias=False,
        divergence="jsd",
        beta=0.3,
        temperature=1.0,
        logit_scale=1.0,
        logit_softcap=None,
        teacher_temperature=1.0,
        teacher_logit_scale=1.0,
        teacher_logit_softcap=None,
        clip="token",
        clip_threshold=0.1,
        memory_budget=None,
        backend=str(backend),
        group=None,
    )
    targets = torch.randint(0, 60, (10,))
    tensors = (student, teacher, weight, None, None, None, targets, torch.rand(10))
    torch.library.opcheck(linear._operator.forward, (*tensors, per_token, *options))
    torch.library.opcheck(
        linear._operator.recompute,
        (*(x if x is None else x.detach() for x in tensors), *options),
    )
    chosen = log_prob.Options(True, True, True, False, 1.0, 1.0, None, None, str(backend), None)
    torch.library.opcheck(
        log_prob._operator.forward,
        (student, weight, None, targets, torch.ones(10), True, *chosen),
    )


def test_runs_are_equal_bit_for_bit():
    student, teacher, weight = problem()

    def run():
        loss = linear_divergence(student, teacher, weight, divergence="jsd").loss
        return [loss.detach(), *gradients(loss, student, weight)]

    assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))
