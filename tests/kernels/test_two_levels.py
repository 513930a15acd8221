"""Gradients of a group of blocks, kept in 16 bits until one product takes them all: with the
products of a GPU, on any backend, against the dense reference in fp64.
"""

from dataclasses import replace

import pytest
import torch
from helpers.gpu_rounding import emulate_gpu_products
from helpers.kernel_cases import CPU_BACKENDS, DIVERGENCES, make, relative_error

from opsd_kernels import Clip, gemm, linear_log_prob, reference
from opsd_kernels.plan import plan
from opsd_kernels.resolve import load

# Tokens, vocabulary, width, budget (bytes, beside a backend's temporaries), and the groups that it
# makes: few more tokens than a block's; several groups, the last shorter; one group, whose last
# block is shorter.
SHAPES = ((19, 301, 8, 54_000, 1), (130, 2051, 16, 420_000, 4), (97, 1025, 24, 250_000, 2))


def budget_of(size: int, backend: str, vocabulary: int) -> int:
    return size + 4 * load(backend).TEMPORARIES * min(2**15, 18 * vocabulary)


@pytest.fixture
def plans(monkeypatch):
    emulate_gpu_products(monkeypatch)
    found = []

    def recorded(*arguments, **options):
        found.append(plan(*arguments, **options))
        return found[-1]

    monkeypatch.setattr("opsd_kernels.sweep.plan", recorded)
    return found


def check(case, backend: str, scale: float = 1.0) -> None:
    fused, exact = case.require_grad(), case.to(torch.float64).require_grad()
    result = fused.fused(backend)
    (result.loss.sum() * scale).backward()
    truth = exact.dense()
    truth.sum().backward()
    assert relative_error(result.loss, truth) < 1e-2
    for got, want in zip(fused.trainable(), exact.trainable(), strict=True):
        assert relative_error(got.grad.double() / scale, want.grad) < 1e-2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_groups_of_blocks(plans, backend, divergence, shape):
    *sizes, budget, groups = shape
    token_weight = torch.rand(sizes[0])
    for clip in (None, Clip("entry", 0.02), Clip("token", 0.3)):
        options = {"clip": clip, "budget": budget_of(budget, backend, sizes[1])}
        case = make(*sizes, divergence=divergence, bias=True, **options)
        case = replace(case, token_weight=token_weight)
        check(case.to(torch.bfloat16), backend)
        check(case.to(torch.float16), backend, 2.0**10)
    for found in plans:
        assert found.one_pass and found.groups == groups and found.group > found.rows


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_log_probs_and_per_token_losses(plans, backend):
    n, v, d = 130, 2051, 16
    case = make(n, v, d, reduction="none", budget=budget_of(420_000, backend, v)).to(torch.bfloat16)
    check(case, backend)
    fused, exact = case.require_grad(), case.to(torch.float64).require_grad()
    budget = 250_000 + (12 * 2**15 if backend == "torch" else 0)
    targets, options = torch.randint(v, (n,)), {"memory_budget": budget, "backend": backend}
    linear_log_prob(
        fused.student, fused.weight, targets, reduction="sum", **options
    ).log_prob.backward()
    reference.linear_log_prob(exact.student, exact.weight, targets)[0].sum().backward()
    for got, want in zip(fused.trainable(), exact.trainable(), strict=True):
        assert relative_error(got.grad, want.grad) < 1e-2
    assert plans[-1].group > plans[-1].rows and plans[-1].groups > 1


def test_dw_is_one_product_a_group(plans, monkeypatch):
    """And one that writes it at once, with no sum in fp32, where there is but one group."""
    seen = []
    for name in ("set_weight_gradient_", "add_weight_gradient_", "add_input_gradient_"):
        product = getattr(gemm, name)

        def counted(out, gradient, other, *more, name=name, product=product):
            seen.append((name, len(gradient), out.dtype))
            product(out, gradient, other, *more)

        monkeypatch.setattr(gemm, name, counted)
    for budget in (400_000, 250_000):
        case = make(97, 1025, 24, budget=budget_of(budget, "torch", 1025)).to(torch.bfloat16)
        case.require_grad().fused("torch").loss.backward()
    whole, half = (97, torch.bfloat16), (49, torch.float32)
    assert seen[:2] == [
        ("add_input_gradient_", 97, torch.float32),
        ("set_weight_gradient_", *whole),
    ]
    assert ("add_weight_gradient_", *half) in seen[2:] and len(seen) == 6
    # A frozen head has no dW to save: its blocks are as large as they can be.
    replace(case, frozen=True).require_grad().fused("torch").loss.backward()
    assert plans[-1].group == plans[-1].rows
