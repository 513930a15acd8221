"""linear_log_prob against the fp64 truth."""

import re

import pytest
import torch
from helpers.kernel_cases import BACKENDS, LIMITS, SHAPES, make, relative_error

from opsd_kernels import LogitTransform, gemm, linear_log_prob, log_prob, reference


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable head", "frozen head"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_log_prob(backend, shape, frozen):
    n, v, d = shape
    for dtype in (torch.float32, torch.bfloat16):
        for softcap in (None, 5.0):
            transform = LogitTransform(1.2, 0.9, softcap)
            base = make(n, v, d, bias=not frozen).to(dtype)
            targets = torch.randint(0, v, (n,))
            fused, plain = base.require_grad(), base.to(torch.float64).require_grad()
            fused.weight.requires_grad_(not frozen)
            plain.weight.requires_grad_(not frozen)
            result = linear_log_prob(
                fused.student,
                fused.weight,
                targets,
                bias=fused.bias,
                temperature=1.2,
                logit_scale=0.9,
                logit_softcap=softcap,
                memory_budget=70 * v * 8 * 4,
                backend=backend,
            )
            truth, entropy = reference.linear_log_prob(
                plain.student, plain.weight, targets, bias=plain.bias, transform=transform
            )
            upstream = torch.randn(n)
            got, want = (
                torch.autograd.grad(x, [p for p in c.trainable() if p.requires_grad], u)
                for x, c, u in (
                    (result.log_prob, fused, upstream),
                    (truth, plain, upstream.double()),
                )
            )
            limit = LIMITS[dtype][1]
            assert not result.entropy.requires_grad
            for x, y in ((result.log_prob, truth), (result.entropy, entropy)):
                assert relative_error(x, y) <= LIMITS[torch.float32][0]  # logits are fp32 anyhow
            for x, y in zip(got, want, strict=True):
                assert x.dtype == dtype and relative_error(x, y) <= limit


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable head", "frozen head"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_and_reductions(backend, reduction, frozen):
    """What tokens of weight 0 hold, NaN and targets of -100, does not leak; in one block and in
    several.
    """
    n, v = 30, 167
    token_weight = torch.rand(n) * (torch.arange(n) % 4 != 1)
    targets = torch.randint(0, v, (n,))
    for budget in (None, 12 * v * 4 * 8 + 2**17, 9000):
        case = make(n, v, 12, bias=True).require_grad()
        with torch.no_grad():
            case.student[token_weight == 0] = torch.nan
        targets[token_weight == 0] = -100
        inputs = (case.student,) if frozen else (case.student, case.weight, case.bias)
        result = linear_log_prob(
            case.student,
            case.weight if not frozen else case.weight.detach(),
            targets,
            bias=case.bias if not frozen else case.bias.detach(),
            token_weight=token_weight,
            reduction=reduction,
            memory_budget=budget,
            backend=backend,
        )
        truth = case.to(torch.float64).require_grad()
        with torch.no_grad():
            truth.student.nan_to_num_(0.0)
        log_p, entropy = reference.linear_log_prob(
            truth.student, truth.weight, targets.clamp(min=0), bias=truth.bias
        )
        weighted = token_weight.double() * log_p
        if reduction != "none":
            weighted = weighted.sum() / (token_weight.sum() if reduction == "mean" else 1.0)
        assert relative_error(result.log_prob, weighted) < 1e-5
        keep = (token_weight != 0).double()
        assert relative_error(result.per_token, keep * log_p) < 1e-5
        assert relative_error(result.entropy, keep * entropy) < 1e-5
        upstream = torch.rand_like(result.log_prob)
        got = torch.autograd.grad(result.log_prob, inputs, upstream)
        exact = (truth.student, truth.weight, truth.bias)[: len(inputs)]
        want = torch.autograd.grad(weighted, exact, upstream.double())
        for x, y in zip(got, want, strict=True):
            assert x.isfinite().all() and relative_error(x, y) < 1e-4


def test_nothing_to_do():
    hidden, weight = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    for reduction in ("mean", "sum"):
        result = linear_log_prob(
            hidden,
            weight,
            torch.full((3,), -100),
            token_weight=torch.zeros(3),
            reduction=reduction,
        )
        assert result.log_prob == 0
        result.log_prob.backward()
        assert not hidden.grad.any() and not weight.grad.any()


def test_known_weights_save_products(monkeypatch):
    """A trained head is multiplied three times, not four, where forward knows what tokens count."""
    calls = []
    for name in ("logits_", "add_input_gradient_", "set_weight_gradient_"):
        original = getattr(gemm, name)
        monkeypatch.setattr(gemm, name, lambda *a, f=original, n=name: (calls.append(n), f(*a))[-1])
    case, targets = make(9, 200, 8).require_grad(), torch.randint(0, 200, (9,))
    for reduction, logits in (("mean", 1), ("none", 2)):
        calls.clear()
        linear_log_prob(
            case.student, case.weight, targets, reduction=reduction
        ).log_prob.sum().backward()
        assert calls.count("logits_") == logits and len(calls) == logits + 2


def _without_dropping(drop_zeros: bool, *, make=log_prob.Options, **options):
    return make(drop_zeros=False, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_of_minus_100_are_ignored(backend, reduction):
    """As torch's cross-entropy has it; what their hidden states hold does not leak."""
    n, v = 12, 50
    targets = torch.randint(0, v, (n,))
    targets[[2, 7, 11]] = -100
    for masked in (False, True):  # as on a GPU, which is not made to wait
        case = make(n, v, 8).require_grad()
        with torch.no_grad():
            case.student[7] = torch.nan
        call = (case.student, case.weight, targets)
        with pytest.MonkeyPatch.context() as patch:
            if masked:
                patch.setattr(log_prob, "Options", _without_dropping)
            result = linear_log_prob(*call, reduction=reduction, backend=backend)
        truth = case.to(torch.float64).require_grad()
        with torch.no_grad():
            truth.student.nan_to_num_(0.0)
        z = truth.student @ truth.weight.T
        want = -torch.nn.functional.cross_entropy(z, targets, reduction=reduction)
        torch.testing.assert_close(result.log_prob.double(), want, rtol=1e-5, atol=1e-6)
        result.log_prob.sum().backward()
        want.sum().backward()
        for x, y in (
            (case.student.grad, truth.student.grad),
            (case.weight.grad, truth.weight.grad),
        ):
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)
        assert not result.entropy[[2, 7, 11]].any() and not result.per_token[[2, 7, 11]].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_outside_under_compile(backend):
    """Nobody looks at their values there: NaN, for their tokens only."""
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8)
    targets = torch.tensor([3, 30, -100, -7, 29])

    def log_probs(hidden, targets):
        return linear_log_prob(hidden, weight, targets, backend=str(backend)).log_prob

    found = torch.compile(log_probs, fullgraph=True, backend="aot_eager")(hidden, targets)
    assert found[[1, 3]].isnan().all() and found[2] == 0 and found[[0, 4]].isfinite().all()
    found[0].backward()
    log_p = (hidden @ weight.T).log_softmax(-1)
    torch.testing.assert_close(found[[0, 4]], log_p[[0, 4], targets[[0, 4]]])


def test_targets_that_do_not_fit():
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    for targets, text in (
        (torch.tensor([0, 1, 5]), "from 0 to 5"),
        (torch.tensor([0, -1, 2]), "from -1"),
        (torch.tensor([0.0, 1, 2]), "integers"),
        (torch.tensor([0, 1]), "one for each token"),
    ):
        with pytest.raises(ValueError, match=f"targets: got .*{text}"):
            linear_log_prob(hidden, weight, targets)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_forward_accepts_as_budget_backward_does_too(backend):
    """With a trainable head and a loss a token, backward runs the call again, and wants more."""
    case = make(5, 40, 8).to(torch.bfloat16).require_grad()
    call = (case.student, case.weight, torch.arange(5))
    with pytest.raises(ValueError, match="memory_budget") as error:
        linear_log_prob(*call, memory_budget=1, backend=backend)
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    linear_log_prob(*call, memory_budget=least, backend=backend).log_prob.sum().backward()
    assert case.student.grad.any() and case.weight.grad.any()
