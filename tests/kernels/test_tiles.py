"""The tile functions by themselves: vocabulary tiles of any size give what a whole row gives, and
every backend's what torch's gives in fp64.
"""

import pytest
import torch
from helpers.kernel_cases import BACKENDS, DIVERGENCES, KINDS
from helpers.tile_cases import CLIPS, TRANSFORMS, N, V, leaves_in_16_bits, problem, sweep

from opsd_kernels import Clip, Divergence, LogitTransform
from opsd_kernels.divergence import Rule
from opsd_kernels.resolve import load
from opsd_kernels.tiles import state as states
from opsd_kernels.tiles.logits import Logits


@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tiles_of_any_size(backend, transform, clip, divergence):
    tensors, row_weight = problem(biased=transform != "plain"), torch.rand(N)
    rule = Rule(KINDS[divergence], TRANSFORMS[transform], CLIPS[clip])
    truth = sweep("torch", tensors, (), rule, row_weight, torch.float64, True)
    for dtype, limit in ((torch.float32, 2e-5), (torch.float64, 1e-12)):
        if backend != "torch" and dtype == torch.float64:
            continue
        for cuts in ((), (512,), (1, 17, 18, 700, 1042)):
            for early in (True, False) if clip == "none" else (True,):
                state, gradient = sweep(backend, tensors, cuts, rule, row_weight, dtype, early)
                torch.testing.assert_close(state.double(), truth[0], rtol=limit, atol=5 * limit)
                torch.testing.assert_close(gradient.double(), truth[1], rtol=limit, atol=limit)
                # A token with equal roles: exactly nothing, unless the clip takes some entries.
                assert state[states.DIVERGENCE, 1] == 0 and state[states.COUNT, 1] == 0
                assert not gradient[1].any() or clip == "entry"


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_in_16_bits(backend):
    leaves_in_16_bits(backend)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("clip", CLIPS)
def test_slices_of_a_tile(monkeypatch, clip, divergence):
    """torch's backend works on a part of the tile at a time: of some rows, or of a row."""
    tensors, row_weight = problem(biased=True), torch.rand(N)
    call = (tensors, (), Rule(Divergence(divergence, 0.3), TRANSFORMS["capped"], CLIPS[clip]))
    whole = sweep("torch", *call, row_weight, torch.float64, True)
    for entries in (2 * V, 97):
        monkeypatch.setattr(load("torch"), "slice_entries", lambda device, n=entries: n)
        found = sweep("torch", *call, row_weight, torch.float64, True)
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)


def test_slices_of_a_log_prob_tile(monkeypatch):
    products, _, bias, _ = problem(biased=True)
    targets, found = torch.tensor([511, 512, 1042]), []
    for entries in (2**15, 2 * V, 97):
        monkeypatch.setattr(load("torch"), "slice_entries", lambda device, n=entries: n)
        logits = Logits(products.clone(), bias)
        state = states.new_log_prob(N, products, products.dtype)
        call = (logits, targets, TRANSFORMS["capped"], state)
        load("torch").log_prob_normalisers(*call)
        load("torch").log_prob_gradient_(*call, torch.rand(N, generator=torch.manual_seed(0)))
        found.append((state, logits.product))
    for sliced in found[1:]:
        torch.testing.assert_close(sliced, found[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_gradient(backend):
    """row_weight=None with an entry clip: the dot product, and the tile stays as it is."""
    tensors, rule = problem(False), Rule(clip=Clip("entry", 1e-3))
    tiles = [Logits(x.float()) for x in tensors[:2]]
    functions, state = load(backend), states.new(N, tiles[0].product, torch.float32)
    functions.normalisers(*tiles, rule, state)
    functions.sums(*tiles, rule, state)
    functions.gradient_(*tiles, rule, state, None)
    assert torch.equal(tiles[0].product, tensors[0].float()) and state[states.DOT].any()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_log_prob_tiles(backend, transform):
    products, _, bias, _ = problem(biased=True)
    targets = torch.tensor([511, 512, 1042])
    z = products + bias
    described = TRANSFORMS[transform]
    z = z * described.scale
    if described.softcap is not None:
        z = described.softcap * torch.tanh(z / described.softcap)
    log_p = (z / described.temperature).log_softmax(-1)
    functions = load(backend)
    for cuts in ((), (512,), (1, 17, 18, 700, 1042)):
        tile, state = products.float(), states.new_log_prob(N, products, torch.float32)
        spans = list(zip((0, *cuts), (*cuts, V), strict=True))
        parts = [(Logits(tile[:, a:b], bias[a:b].float()), targets - a) for a, b in spans]
        for part in parts:
            functions.log_prob_normalisers(*part, described, state)
        got = state[states.TARGET] - state[states.MAX] - states.log_sum(state)
        torch.testing.assert_close(got.double(), log_p[range(N), targets], rtol=1e-5, atol=1e-5)
        entropy = states.entropy(state[states.STUDENT])
        torch.testing.assert_close(
            entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-5
        )
        for part in parts:
            functions.log_prob_gradient_(*part, described, state, torch.ones(N))
        g = -log_p.exp()
        g[range(N), targets] += 1
        g *= described.scale / described.temperature
        if described.softcap is not None:
            g *= 1 - (z / described.softcap) ** 2
        torch.testing.assert_close(tile.double(), g, rtol=1e-4, atol=1e-5)


def test_states_of_two_halves_merge():
    """A padded half, in which every entry is -inf, changes nothing and makes no NaN."""
    z, one = 4 * torch.randn(N, 40), states.new_log_prob(N, torch.zeros(1), torch.float32)
    targets, functions = torch.full((N,), -1), load("torch")
    functions.log_prob_normalisers(Logits(z), targets, LogitTransform(), one)
    for cut in (1, 20, 39):
        halves = [states.new_log_prob(N, z, z.dtype) for _ in range(3)]
        nothing = torch.full((N, 3), -torch.inf)
        for part, half in zip((z[:, :cut], z[:, cut:], nothing), halves, strict=True):
            functions.log_prob_normalisers(Logits(part), targets, LogitTransform(), half)
        for order in ((0, 1, 2), (2, 1, 0), (2, 0, 1)):
            merged = states.new_log_prob(N, z, z.dtype)
            for k in order:
                states.merge_(merged, halves[k])
            torch.testing.assert_close(merged, one)
