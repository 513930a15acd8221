"""What other implementations were seen to get wrong. Two more traps are tested elsewhere: reading
past the last vocabulary tile in test_tiles (what lies around a tile is NaN), backward called twice
in test_torch_features.
"""

import pytest
import torch
from helpers.kernel_cases import CPU_BACKENDS, DIVERGENCES, make, relative_error
from helpers.tile_cases import far_apart

from opsd_kernels import Clip, Divergence, linear, log_prob, reference


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_offsets_beyond_two_to_the_31(backend, tmp_path):
    far_apart(backend, tmp_path)


# --- A small divergence is no difference of large sums ---


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_small_divergence_keeps_its_digits(backend, divergence):
    """Nats of 1e-4 from sums of 10: an error of fp32's 1e-7 times 10 would be 1 %."""
    case = make(64, 8192, 64, divergence=divergence)
    case.teacher[:] = case.student + 0.01 * torch.randn(64, 64)
    exact = case.to(torch.float64)
    z, t = (x @ exact.weight.T for x in (exact.student, exact.teacher))
    truth, _ = reference.token_divergence(z, t, Divergence(divergence, case.beta))
    assert truth.mean() < 3e-4
    got = case.fused(backend).per_token
    assert relative_error(got, truth) < 1e-3
    if divergence == "forward_kl":  # what the limit is there to tell apart
        z, t = (x @ case.weight.T for x in (case.student, case.teacher))
        difference = (t.softmax(-1) * (t - z)).sum(-1) + z.logsumexp(-1) - t.logsumexp(-1)
        assert relative_error(difference, truth) > 1e-3


# --- dW accumulates in fp32 ---


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_small_gradients_do_not_vanish_in_a_sum_of_blocks(backend):
    """600 equal tokens in blocks of a few: a bf16 sum stands still once it is 256 times what is
    added, and would end below half.
    """
    n, v, d = 600, 96, 8
    case = make(1, v, d).to(torch.bfloat16)
    rows = [x.expand(n, d).contiguous() for x in (case.student, case.teacher)]
    many = case.__class__(*rows, case.weight, reduction="sum", budget=20_000).require_grad()
    many.fused(backend).loss.backward()
    one = case.to(torch.float64).require_grad()
    one.dense().backward()
    assert relative_error(many.weight.grad, n * one.weight.grad) < 2**-8  # one rounding


# --- Any upstream gradient ---


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_upstream_gradients_that_are_not_contiguous(backend, frozen):
    """Transposed, every second of a longer one, and expanded from one number."""
    case = make(12, 250, 8, reduction="none", frozen=frozen).require_grad()
    for upstream in (torch.rand(4, 3).T, torch.rand(24)[::2], torch.rand(()).expand(12)):
        assert not upstream.is_contiguous()
        loss = case.fused(backend).loss.view(upstream.shape)
        got = torch.autograd.grad(loss, case.trainable(), upstream)
        plain = case.fused(backend).loss.view(upstream.shape)
        want = torch.autograd.grad(plain, case.trainable(), upstream.contiguous())
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


# --- Nothing waits for the device ---


@pytest.mark.parametrize("clip", [None, Clip("entry", 0.1), Clip("token", 0.1)], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_call_looks_at_its_tensors(divergence, clip):
    """The whole algorithm on tensors that have no values, and are larger than memory: reading one,
    as any wait for a device does, raises. What remains is the count that dropping tokens of weight
    0 needs.
    """

    def run(n: int, v: int, budget: int, drop_zeros: bool = False, trained: bool = True):
        hidden, weight, row_weight = (
            torch.empty(shape, device="meta", dtype=dtype)
            for shape, dtype in (
                ((n, 64), torch.bfloat16),
                ((v, 64), torch.bfloat16),
                ((n,), torch.float32),
            )
        )
        options = linear.Options(
            drop_zeros=drop_zeros,
            want_hidden=True,
            want_weight=trained,
            want_bias=False,
            divergence=divergence,
            beta=0.3,
            temperature=1.0,
            logit_scale=1.0,
            logit_softcap=None,
            teacher_temperature=1.0,
            teacher_logit_scale=1.0,
            teacher_logit_softcap=None,
            clip=None if clip is None else clip.kind,
            clip_threshold=0.1,
            memory_budget=budget,
            backend="torch",
            group=None,
        )
        tensors = (hidden, hidden, weight, None, None, None, None)
        operator = linear._operator
        work = operator._without_zeros if drop_zeros else operator.run
        loss, stats, d_hidden, d_weight, _ = work(tensors, row_weight, options, True)
        assert loss.shape == (n,) and stats.shape == (operator.statistics, n)
        assert d_hidden.shape == hidden.shape
        assert (d_weight is None) == (not trained)
        targets = torch.empty(n, device="meta", dtype=torch.long)
        chosen = log_prob.Options(
            False, True, trained, False, 1.0, 1.0, None, budget, "torch", None
        )
        log_prob._operator.run((hidden, weight, None, targets), row_weight, chosen, True)

    for trained in (True, False):
        run(20, 5000, 2**30, trained=trained)  # one pass
        run(20, 5000, 2**20, trained=trained)  # tiles
    if clip is None:
        run(8192, 262144, 2**33)  # N V = 2^31
    with pytest.raises(NotImplementedError, match="nonzero"):
        run(20, 5000, 2**20, drop_zeros=True)
