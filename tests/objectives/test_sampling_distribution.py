"""The scored distribution is the one that draws: temperature, top-k and top-p, against autograd."""

import pytest
import torch

from opsd.objectives.log_probs import sampled_log_prob
from opsd.rollout.base import Sampling
from opsd.rollout.logits_sampling import Draw

N, V, D = 13, 41, 8
WAYS = {
    "plain": Sampling(8),
    "cold": Sampling(8, temperature=0.5),
    "hot": Sampling(8, temperature=1.7),
    "top-k": Sampling(8, top_k=5),
    "top-p": Sampling(8, top_p=0.8),
    "all": Sampling(8, temperature=0.7, top_p=0.9, top_k=12),
}


def problem():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).requires_grad_()
    weight = (2 * torch.randn(V, D, generator=generator)).requires_grad_()
    return hidden, weight


def dense(hidden, weight, sampling):
    """log q [N, V] by sorting, in fp64."""
    z = hidden.double() @ weight.double().T / sampling.temperature
    left = torch.ones_like(z, dtype=torch.bool)
    order = z.detach().argsort(-1, descending=True)
    if sampling.top_k:
        left &= torch.zeros_like(left).scatter(1, order[:, : sampling.top_k], True)
    if sampling.top_p < 1:
        probability = z.detach().masked_fill(~left, -torch.inf).softmax(-1).gather(1, order)
        before = probability.cumsum(-1) - probability  # of the likelier tokens
        left &= torch.zeros_like(left).scatter(1, order, before < sampling.top_p)
    return z.masked_fill(~left, -torch.inf).log_softmax(-1)


@pytest.mark.parametrize("budget", [None, 4 * 6 * V * 3])
@pytest.mark.parametrize("name", WAYS)
def test_values_and_gradients_are_those_of_a_dense_row(name, budget):
    sampling, (hidden, weight) = WAYS[name], problem()
    log_q = dense(hidden, weight, sampling)
    torch.manual_seed(0)
    targets = torch.multinomial(log_q.detach().exp(), 1)[:, 0]
    factors = torch.linspace(-1, 1, N)
    memory = None if budget is None else {"memory_budget": budget} if "top" in name else None
    found = sampled_log_prob(hidden, weight, targets, sampling, **(memory or {}))
    wanted = log_q.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.log_prob.double(), wanted, atol=1e-5, rtol=1e-5)
    entropy = -(log_q.exp() * log_q.masked_fill(log_q.isinf(), 0)).sum(-1)
    torch.testing.assert_close(found.entropy.double(), entropy, atol=1e-5, rtol=1e-5)
    ours = torch.autograd.grad((found.log_prob * factors).sum(), (hidden, weight))
    theirs = torch.autograd.grad((wanted * factors).sum(), (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", WAYS)
def test_what_draws_is_what_is_scored(name):
    """Frequencies of 40 000 draws against exp(log q) of every token."""
    sampling, (hidden, weight) = WAYS[name], problem()
    state = hidden[:1].detach()
    every = torch.arange(V)
    log_q = sampled_log_prob(state.expand(V, D), weight.detach(), every, sampling).log_prob
    if "top" in name or name == "all":  # a target is always left: these are not
        drawable = dense(state, weight.detach(), sampling)[0].isfinite()
        log_q = log_q.masked_fill(~drawable, -torch.inf)
    torch.manual_seed(1)
    logits = (state @ weight.detach().T).expand(40_000, V)
    drawn = Draw(sampling)(torch.zeros(40_000, 1, dtype=torch.long), logits).argmax(-1)
    frequency = drawn.bincount(minlength=V) / len(drawn)
    assert (frequency - log_q.exp()).abs().sum() / 2 < 0.015


def test_nothing_is_scored_without_tokens():
    hidden, weight = problem()
    found = sampled_log_prob(hidden[:0], weight, torch.zeros(0, dtype=torch.long), WAYS["all"])
    assert found.log_prob.shape == (0,)
