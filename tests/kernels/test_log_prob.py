"""linear_log_prob against the fp64 truth."""

import pytest
import torch
from kernel_cases import BACKENDS, LIMITS, SHAPES, make, relative_error

from opsd_kernels import LogitTransform, linear_log_prob, reference


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


def test_targets_that_do_not_fit():
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    for targets, text in (
        (torch.tensor([0, 1, 5]), "from 0 to 5"),
        (torch.tensor([0, -100, 2]), "-100"),
        (torch.tensor([0.0, 1, 2]), "integers"),
        (torch.tensor([0, 1]), "one for each token"),
    ):
        with pytest.raises(ValueError, match=f"targets: got .*{text}"):
            linear_log_prob(hidden, weight, targets)
