"""The fused divergence against the fp64 truth: shapes, dtypes, options."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.gpu_rounding import emulate_gpu_products
from helpers.kernel_cases import (
    BACKENDS,
    CPU_BACKENDS,
    DIVERGENCES,
    KINDS,
    LIMITS,
    SHAPES,
    check,
    make,
    relative_error,
)

from opsd_kernels import Clip, LogitTransform, linear_divergence, reference, sweep
from opsd_kernels.divergence import Divergence
from opsd_kernels.linear import _check_token_loss
from opsd_kernels.plan import plan
from opsd_kernels.sharded import Placement

DTYPES = {
    "cpp": (torch.float32, torch.bfloat16, torch.float16),
    "torch": (torch.float64, torch.float32, torch.bfloat16),
}
CLIPS = {"none": None, "entry": Clip("entry", 0.02), "token": Clip("token", 0.3)}


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable head", "frozen head"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_dtypes(backend, divergence, shape, frozen, monkeypatch):
    plans = []
    monkeypatch.setattr(sweep, "plan", lambda *a, **k: plans.append(plan(*a, **k)) or plans[-1])
    n, v, d = shape
    # All logits at once; several blocks of whole rows; narrow tiles. (bf16 is widened, which takes
    # memory by the column.)
    budgets = (None, 50 * v * 16 + 2**18, 64 * (8 * 8 + 4 * d) + 5000 + 500 * n)
    case = make(*shape, divergence=divergence, frozen=frozen)
    for dtype in DTYPES[backend]:
        check(case, dtype, backend, budgets)
    if n > 100:  # where they differ in all of that
        kinds = {(p.one_pass, p.blocks > 1) for p in plans}
        assert kinds >= {(True, False), (True, True), (False, True)}, plans


@pytest.mark.parametrize("budget", [None, 8000], ids=["one pass", "tiles"])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_options(backend, divergence, clip, budget):
    for reduction, softcap, separate, weighted in itertools.product(
        ("mean", "sum", "none"), (None, 5.0), (False, True), (False, True)
    ):
        case = make(
            9,
            167,
            16,
            budget=budget,
            bias=True,
            divergence=divergence,
            clip=CLIPS[clip],
            reduction=reduction,
            transform=LogitTransform(1.3, 0.7, softcap),
            teacher_weight=torch.randn(167, 16) if separate else None,
            token_weight=torch.rand(9) * (torch.arange(9) % 3 != 0) if weighted else None,
        )
        check(case, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wider_teacher(backend):
    case = make(6, 41, 8)
    teacher, head = torch.randn(6, 20), torch.randn(41, 20)
    for dtype in DTYPES[backend]:
        check(
            make(6, 41, 8, divergence="jsd").__class__(
                case.student, teacher, case.weight, head, divergence="jsd"
            ),
            dtype,
            backend,
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_subset_of_gradients(backend, reduction):
    case = make(8, 50, 12, bias=True, reduction=reduction)
    names = ("student", "weight", "bias")
    full = case.require_grad()
    upstream = torch.rand_like(full.fused(backend).loss)
    expected = torch.autograd.grad(full.fused(backend).loss, full.trainable(), upstream)
    for subset in itertools.product((False, True), repeat=3):
        part = case.require_grad()
        for name, wanted in zip(names, subset, strict=True):
            getattr(part, name).requires_grad_(wanted)
        result = part.fused(backend)
        assert result.loss.requires_grad == any(subset)
        if any(subset):
            result.loss.backward(upstream)
        for name, wanted, gradient in zip(names, subset, expected, strict=True):
            got = getattr(part, name).grad
            assert (got is not None) == wanted
            if wanted:
                torch.testing.assert_close(got, gradient)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_transform_of_each_role(backend, divergence):
    """Temperature, scale and soft cap of the teacher alone; one role capped and the other not."""
    for student, teacher in (
        (LogitTransform(1.3, 0.7), LogitTransform(0.8, -1.2)),
        (LogitTransform(1.0, 1.0, 4.0), LogitTransform(1.0, 1.0)),
        (LogitTransform(), LogitTransform(0.9, 2.0, 3.0)),
        (LogitTransform(1.1, 1.0, 4.0), LogitTransform(0.9, 2.0, 3.0)),
    ):
        for budget in (None, 9000):
            case = make(
                6, 301, 8, bias=True, divergence=divergence, transform=student,
                teacher_transform=teacher, budget=budget,
            )  # fmt: skip
            check(case, torch.float32, backend)


def test_mixtures_next_to_a_role_are_refused_below_fp64():
    case = make(3, 20, 4)
    for beta in (9e-5, 1 - 9e-5):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            low = case.to(dtype)
            with pytest.raises(ValueError, match=r"beta: got .*between 0\.0001 and 1 - 0\.0001"):
                linear_divergence(low.student, low.teacher, low.weight, divergence="jsd", beta=beta)
        exact = case.__class__(**{**vars(case.to(torch.float64)), "divergence": "jsd"})
        exact = exact.__class__(**{**vars(exact), "beta": beta})
        torch.testing.assert_close(exact.fused("torch").loss, exact.dense(), rtol=1e-7, atol=0)
        linear_divergence(case.student, case.teacher, case.weight, beta=beta)  # of no jsd
    for beta in (1e-4, 1 - 1e-4):
        for backend in CPU_BACKENDS:
            near = make(6, 301, 8, divergence="jsd", beta=beta)
            exact = near.to(torch.float64).dense()
            assert relative_error(near.fused(backend).loss, exact) < 2e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_teacher_gets_no_gradient(backend):
    case = make(5, 30, 8, teacher_weight=torch.randn(30, 8)).require_grad()
    case.teacher.requires_grad_()
    case.teacher_weight.requires_grad_()
    case.fused(backend).loss.backward()
    assert case.teacher.grad is None and case.teacher_weight.grad is None


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics(backend, clip, divergence):
    case = make(12, 90, 16, divergence=divergence, clip=CLIPS[clip], token_weight=torch.rand(12))
    case.token_weight[3] = 0.0
    result = case.fused(backend)
    exact = case.to(torch.float64)
    z = reference.logits(exact.student, exact.weight, None, case.transform).requires_grad_()
    t = reference.logits(exact.teacher, exact.weight, None, case.transform)
    described = Divergence(divergence, case.beta)
    clipped, unclipped = reference.token_divergence(z, t, described, case.clip)
    keep = torch.arange(12) != 3
    for got, want in (
        (result.per_token, unclipped),
        (result.student_entropy, reference.entropy(z.log_softmax(-1))),
        (result.teacher_entropy, reference.entropy(t.log_softmax(-1))),
    ):
        assert got.dtype == torch.float32 and not got.requires_grad and got[3] == 0
        assert relative_error(got[keep], want[keep]) < 1e-5
    g_clipped, g = (
        torch.autograd.grad(x.sum(), z, retain_graph=True)[0] for x in (clipped, unclipped)
    )
    opposed = ((g_clipped * g).sum(-1) < 0)[keep].double().mean()
    terms = reference.entries(z.log_softmax(-1), t.log_softmax(-1), described)[keep]
    fraction = {
        "none": torch.tensor(0.0),
        "entry": (terms > 0.02).double().mean(),
        "token": (unclipped > 0.3)[keep].double().mean(),
    }[clip]
    torch.testing.assert_close(result.clipped_fraction.double(), fraction.double())
    torch.testing.assert_close(result.inverted_gradient_fraction.double(), opposed)


def test_a_small_entry_clip_opposes():
    """The trap of method.md, seen: with a tiny threshold most tokens' gradients turn around."""
    case = make(64, 200, 16, clip=Clip("entry", 1e-6))
    for backend in CPU_BACKENDS:
        assert case.fused(backend).inverted_gradient_fraction > 0.5


@pytest.mark.parametrize("budget", [None, 1 << 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_sweep_gives_the_targets_log_probabilities(backend, budget):
    """Of both roles, each by its own head and transform; 0 where a token counts nothing."""
    n, v, d = 70, 4099, 24
    shapes = (n, d), (n, 2 * d), (v, d), (v, 2 * d), (v,), (v,)
    made = [torch.randn(shape).requires_grad_() for shape in shapes]
    student, teacher, weight, teacher_weight, bias, teacher_bias = made
    targets, counts = torch.randint(v, (n,)), (torch.arange(n) % 5 != 0).float()
    options = {"temperature": 0.7, "logit_scale": 0.2, "logit_softcap": 9.0}
    for clip in (None, Clip("entry", 0.05)):
        result = linear_divergence(
            *made[:4],
            bias=bias,
            teacher_bias=teacher_bias,
            divergence="reverse_kl",
            token_weight=counts,
            targets=targets,
            teacher_transform=LogitTransform(),
            backend=backend,
            clip=clip,
            memory_budget=budget,
            **options,
        )
        z = 9 * torch.tanh(0.2 * (student.double() @ weight.double().T + bias) / 9) / 0.7
        z_t = teacher.double() @ teacher_weight.double().T + teacher_bias
        for found, logits in ((result.log_prob, z), (result.teacher_log_prob, z_t)):
            wanted = logits.log_softmax(-1)[torch.arange(n), targets] * counts
            assert not found.requires_grad
            assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert linear_divergence(*made[:4]).log_prob is None


def test_targets_outside_the_vocabulary_are_refused():
    states = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="targets: got values from 0 to 5, must lie in"):
        linear_divergence(states, states, torch.eye(5, 4), targets=torch.tensor([0, 5]))


@pytest.mark.parametrize("clip", [None, Clip("token", 0.03), Clip("entry", 1e-4)])
@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_of_the_targets_log_probability_shares_the_sweep(backend, divergence, clip):
    """A clipped policy gradient beside the divergence, in one block of whole rows or tile by tile,
    head frozen or not: loss and gradients of both written down densely in fp64."""
    case = make(70, 4099, 24, bias=True, divergence=divergence, clip=clip, reduction="sum")
    case = replace(case, transform=LogitTransform(0.7, 0.4, 9.0), token_weight=torch.rand(70))
    case.token_weight[::5] = 0  # these have no loss of the log-probability either
    targets, advantage, old = torch.randint(4099, (70,)), torch.randn(70), -8 + torch.randn(70)

    def policy(log_prob, rows):
        a, ratio = advantage[rows], (log_prob - old[rows]).exp()
        return -3 * torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)

    truth = replace(case.to(torch.float64), frozen=False).require_grad()
    z = (truth.student @ truth.weight.T + truth.bias) * 0.4
    log_p = (9 * torch.tanh(z / 9) / 0.7).log_softmax(-1)[torch.arange(70), targets]
    kept = truth.token_weight != 0
    beside = torch.where(kept, policy(log_p, slice(None)), 0.0)
    wanted = truth.dense() + beside.sum()
    wanted.backward()
    for budget, frozen in ((None, False), (1 << 19, False), (None, True), (1 << 19, True)):
        ours = replace(case, budget=budget, frozen=frozen).require_grad()
        result = ours.fused(backend, targets=targets, token_loss=policy)
        (2 * result.loss).backward()  # backward scales what forward computed
        assert relative_error(result.loss.detach(), wanted.detach()) < 1e-5
        assert relative_error(result.token_loss, beside.detach()) < 1e-5
        assert bool(result.clipped_fraction > 0) == (clip is not None)
        for mine, its in zip(ours.trainable(), truth.trainable(), strict=False):
            assert relative_error(mine.grad / 2, its.grad) < 1e-5


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "as a gpu"])
def test_a_token_loss_far_larger_than_the_divergence_in_bf16(backend, gpu, monkeypatch):
    low = make(40, 301, 24, reduction="sum").to(torch.bfloat16)
    low = replace(low, token_weight=torch.full((40,), 1e-6))
    targets, advantage = torch.randint(301, (40,)), torch.randn(40)
    truth = low.to(torch.float64).require_grad()
    log_p = (truth.student @ truth.weight.T).log_softmax(-1)[torch.arange(40), targets]
    (truth.dense() + (advantage * log_p).sum()).backward()
    if gpu:
        emulate_gpu_products(monkeypatch)
    ours = low.require_grad()
    beside = {"targets": targets, "token_loss": lambda log_p, rows: advantage[rows] * log_p}
    ours.fused(backend, **beside).loss.backward()
    for mine, its in zip(ours.trainable(), truth.trainable(), strict=True):
        assert relative_error(mine.grad, its.grad) < LIMITS[torch.bfloat16][1]


def test_what_a_token_loss_does_not_go_with():
    states, head = torch.zeros(2, 4, requires_grad=True), torch.eye(5, 4)
    call = (states, states, head)
    own, targets = (lambda log_prob, rows: -log_prob), torch.tensor([0, 4])
    with pytest.raises(ValueError, match=r"token_loss: got a function of log-prob.*no targets"):
        linear_divergence(*call, token_loss=own, reduction="sum")
    with pytest.raises(ValueError, match="token_loss: got reduction='mean'"):
        linear_divergence(*call, token_loss=own, targets=targets)
    with pytest.raises(ValueError, match=r"token_loss: returned shape \[\] for .* \[2\]"):
        other = lambda log_prob, rows: log_prob.sum()  # noqa: E731
        linear_divergence(*call, token_loss=other, targets=targets, reduction="sum")
    half = (x.half() for x in call)
    with pytest.raises(ValueError, match="token_loss: got float16 hidden states"):
        linear_divergence(*half, token_loss=own, targets=targets, reduction="sum")
    own_tokens = Placement(SimpleNamespace(group_name="ranks"), own_tokens=True)
    with pytest.raises(ValueError, match="token_loss: got a weight that is a DTensor"):
        _check_token_loss(own, targets, "sum", own_tokens, states)
