"""The reference itself: its gradients against finite differences, its values against torch's own
KL.
"""

import pytest
import torch
from helpers.kernel_cases import DIVERGENCES, make

from opsd_kernels import Clip, Divergence, LogitTransform, reference


@pytest.mark.parametrize("clip", [None, Clip("entry", 0.05)], ids=["no clip", "entry clip"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_are_those_of_the_values(divergence, softcap, clip):
    # The token clip's factor is detached by definition: finite differences would not agree.
    case = make(
        3, 7, 4, divergence=divergence, clip=clip, transform=LogitTransform(1.3, 0.8, softcap)
    ).to(torch.float64)

    def loss(student, weight):
        return reference.linear_divergence(
            student,
            case.teacher,
            weight,
            case.weight,
            divergence=Divergence(divergence, 0.3),
            transform=case.transform,
            clip=clip,
        )

    assert torch.autograd.gradcheck(
        loss, (case.student.requires_grad_(), case.weight.clone().requires_grad_())
    )


def test_values_are_torch_kl():
    s, t = torch.randn(6, 11).double(), torch.randn(6, 11).double()
    log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)

    def kl(log_p, log_q):
        return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)

    def ours(name):
        return reference.token_divergence(s, t, Divergence(name, 0.3))[0]

    log_m = torch.log(0.3 * log_t.exp() + 0.7 * log_s.exp())
    torch.testing.assert_close(ours("forward_kl"), kl(log_t, log_s))
    torch.testing.assert_close(ours("reverse_kl"), kl(log_s, log_t))
    torch.testing.assert_close(ours("jsd"), 0.3 * kl(log_t, log_m) + 0.7 * kl(log_s, log_m))


def test_entry_clip_gradients_are_the_documented_ones():
    s, t = torch.randn(6, 11).double().requires_grad_(), torch.randn(6, 11).double()
    tau, b = 0.05, 0.3
    p, q = s.detach().softmax(-1), t.softmax(-1)
    mixture = b * q + (1 - b) * p
    for name in DIVERGENCES:
        divergence = Divergence(name, b)
        clipped, _ = reference.token_divergence(s, t, divergence, Clip("entry", tau))
        (gradient,) = torch.autograd.grad(clipped.sum(), s)
        terms = reference.entries(s.detach().log_softmax(-1), t.log_softmax(-1), divergence)
        m = (terms <= tau).double()
        if name == "forward_kl":
            expected = -m * q + p * (m * q).sum(-1, keepdim=True)
        else:
            inner = (
                m * ((p / q).log() + 1)
                if name == "reverse_kl"
                else m * (1 - b) * (p / mixture).log()
            )
            expected = p * (inner - (p * inner).sum(-1, keepdim=True))
        torch.testing.assert_close(gradient, expected)


def test_token_clip_scales_by_a_detached_factor():
    s, t = torch.randn(6, 11).double().requires_grad_(), torch.randn(6, 11).double()
    clipped, unclipped = reference.token_divergence(s, t, Divergence(), Clip("token", 0.5))
    factor = (0.5 / unclipped.detach()).clamp(max=1.0)
    assert 0 < int((factor < 1).sum()) < 6  # both sides of the threshold are there
    torch.testing.assert_close(clipped, factor * unclipped)
    (a,) = torch.autograd.grad(clipped.sum(), s, retain_graph=True)
    (b,) = torch.autograd.grad(unclipped.sum(), s)
    torch.testing.assert_close(a, factor[:, None] * b)
