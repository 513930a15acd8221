"""Where rounding is felt: fp16 with a loss scale, small divergences, peaked distributions, NaN.
Right values come from torch autograd and dense fp64.
"""

import functools
import itertools
import struct
import threading
from dataclasses import replace

import pytest
import torch
from helpers.gpu_rounding import emulate_gpu_products
from helpers.kernel_cases import BACKENDS, DIVERGENCES, make, relative_error

from opsd_kernels import (
    Clip,
    Divergence,
    LogitTransform,
    gemm,
    linear_divergence,
    linear_log_prob,
    reference,
)
from opsd_kernels.divergence import Rule
from opsd_kernels.resolve import load
from opsd_kernels.tiles import state as states
from opsd_kernels.tiles.logits import Logits

LOSS_SCALES = (1.0, 2.0**10, 2.0**16)

# --- fp16 with a loss scale ---


def dense_in_fp16(case, loss_scale: float) -> list[torch.Tensor]:
    """Gradients of the scaled loss by torch's autograd, as mixed precision has it: fp16 operands,
    logits and loss in fp32, the gradient of the logits rounded to fp16 for its products. Unscaled,
    in fp64.
    """
    exact = case.to(torch.float64).require_grad()
    z = (exact.student @ exact.weight.T).detach().float().requires_grad_()
    t = exact.teacher @ exact.weight.T
    unclipped, _ = reference.token_divergence(
        z.double(), t, Divergence(case.divergence, case.beta), case.clip
    )
    loss = unclipped.mean() if case.reduction == "mean" else unclipped.sum()
    (g,) = torch.autograd.grad(loss * loss_scale, z)
    g = g.half().double()
    products = (g @ exact.weight.detach(), g.T @ exact.student.detach())
    return [x.half().double() / loss_scale for x in products]


@functools.cache
def fp16_case(divergence: str, reduction: str, device: torch.device):
    """N = 4096 tokens, and the gradients that are right: the same for all backends and scales."""
    frozen = divergence == "jsd" or reduction == "none"  # "none", trained, is another test's
    case = make(4096, 259, 16, divergence=divergence, reduction=reduction, frozen=frozen)
    case = case.to(torch.float16)
    exact = case.to(torch.float64).require_grad()
    return case, torch.autograd.grad(exact.dense().sum(), exact.trainable())


@functools.cache
def rounded(divergence: str, reduction: str, device: torch.device, loss_scale: float):
    """The gradients of `fp16_case` by `dense_in_fp16`."""
    case, _ = fp16_case(divergence, reduction, device)
    if reduction == "none":
        case = replace(case, reduction="sum")
    return dense_in_fp16(case, loss_scale)


@pytest.mark.parametrize("loss_scale", LOSS_SCALES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fp16_with_a_loss_scale(backend, reduction, loss_scale):
    """As right as a dense fp16 product: gradients of 1/N must not vanish before the scale is
    applied, nor those of a sum overflow at every scale.
    """
    for divergence in DIVERGENCES:
        which = divergence, reduction, torch.get_default_device()
        case, exact = fp16_case(*which)
        # What the loss of a sum, or of a loss a token, is multiplied by: N tokens more than a mean.
        scale = loss_scale if reduction == "mean" else loss_scale / len(case.student)
        fused = case.require_grad()
        loss = fused.fused(backend).loss
        (loss.sum() * scale).backward()
        pairs = zip(fused.trainable(), exact, rounded(*which, scale), strict=False)
        for name, (got, want, plain) in zip(("dh", "dW"), pairs, strict=False):
            assert got.grad.dtype == torch.float16
            error = relative_error(got.grad.double() / scale, want)
            limit = max(2 * relative_error(plain, want), 1e-3)
            assert error <= limit, f"{divergence} {name}: {error:.1e}, may be {limit:.1e}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp16_log_probs_with_a_loss_scale(backend):
    n, v, d, scale = 4096, 259, 16, 2.0**16
    for reduction, frozen in itertools.product(("mean", "none"), (False, True)):
        case = make(n, v, d, frozen=frozen).to(torch.float16)
        targets = torch.randint(0, v, (n,))
        fused, exact = case.require_grad(), case.to(torch.float64).require_grad()
        factor = 1.0 if reduction == "mean" else 1.0 / n
        found = linear_log_prob(
            fused.student, fused.weight, targets, reduction=reduction, backend=backend
        ).log_prob
        (found.sum() * factor * scale).backward()
        reference.linear_log_prob(exact.student, exact.weight, targets)[0].mean().backward()
        for got, want in zip(fused.trainable(), exact.trainable(), strict=True):
            assert relative_error(got.grad.double() / scale, want.grad) < 1e-3


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_grad_scaler_finds_a_scale(reduction):
    """A few steps with torch's GradScaler at N = 4096 follow those of fp32."""
    n, v, d, rate = 4096, 257, 16, 0.5
    start = make(n, v, d)
    rate = rate if reduction == "mean" else rate / n
    trained = {}
    for dtype in (torch.float16, torch.float32):
        hidden = start.student.half().float().clone().requires_grad_()
        optimizer = torch.optim.SGD([hidden], rate * n)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=dtype == torch.float16)
        steps = 0
        for _ in range(40):
            optimizer.zero_grad()
            loss = linear_divergence(
                hidden.to(dtype),
                start.teacher.half().to(dtype),
                start.weight.half().to(dtype),
                reduction=reduction,
            ).loss
            scaler.scale(loss).backward()
            before = hidden.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            steps += not torch.equal(before, hidden)
            if steps == 3:
                break
        assert steps == 3, "the scale never became one with finite gradients"
        trained[dtype] = hidden.detach()
    moved = trained[torch.float32] - start.student.half().float()
    assert relative_error(trained[torch.float16] - start.student.half().float(), moved) < 2e-2


@pytest.mark.parametrize("budget", [None, 2**17], ids=["rows", "tiles"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_as_a_gpu_rounds_it(monkeypatch, divergence, dtype, budget):
    """There a gradient is an operand of 16 bits: 1/N of N = 8192 must not take it out of fp16's
    range, nor a weight that is far from the others'.
    """
    emulate_gpu_products(monkeypatch)
    n, v, d = 8192, 131, 8
    for frozen in (False, True):
        case = make(n, v, d, divergence=divergence, frozen=frozen, budget=budget).to(dtype)
        token_weight = torch.ones(n)
        token_weight[:3] = torch.tensor([1e-3, 0.0, 30.0])
        case = case.__class__(**{**vars(case), "token_weight": token_weight})
        fused, exact = case.require_grad(), case.to(torch.float64).require_grad()
        scale = 2.0**16 if dtype == torch.float16 else 1.0
        (fused.fused("torch").loss * scale).backward()
        exact.dense().backward()
        for got, want in zip(fused.trainable(), exact.trainable(), strict=True):
            error = relative_error(got.grad.double() / scale, want.grad)
            assert error < (1e-3 if dtype == torch.float16 else 1e-2)


def test_a_gpus_log_probs(monkeypatch):
    emulate_gpu_products(monkeypatch)
    n, v, d, scale = 8192, 131, 8, 2.0**16
    case = make(n, v, d).to(torch.float16)
    targets = torch.randint(0, v, (n,))
    fused, exact = case.require_grad(), case.to(torch.float64).require_grad()
    for reduction, factor in (("mean", 1.0), ("none", 1.0 / n)):
        fused = case.require_grad()
        found = linear_log_prob(
            fused.student, fused.weight, targets, reduction=reduction, backend="torch"
        ).log_prob
        (found.sum() * factor * scale).backward()
        if exact.student.grad is None:
            reference.linear_log_prob(exact.student, exact.weight, targets)[0].mean().backward()
        for got, want in zip(fused.trainable(), exact.trainable(), strict=True):
            assert relative_error(got.grad.double() / scale, want.grad) < 1e-3


# --- Small divergences and entropies ---


def statistics(backend: str, z: torch.Tensor, t: torch.Tensor, rule: Rule) -> torch.Tensor:
    """The state of whole rows of logits, which are the products here."""
    functions, state = load(backend), states.new(len(z), z, z.dtype)
    roles = Logits(z.clone()), Logits(t.clone())
    functions.normalisers(*roles, rule, state)
    functions.sums(*roles, rule, state)
    return state


@pytest.mark.parametrize("scale", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_divergence_of_5e_5_nats(backend, divergence, scale):
    """To 1e-5, entry for entry; torch's jsd, whose terms are differences, to 3e-5."""
    z = scale * torch.randn(16, 32768)
    t = z + (0.02 if divergence == "jsd" else 0.01) * torch.randn(16, 32768)
    rule = Rule(Divergence(divergence, 0.5))
    truth, _ = reference.token_divergence(z.double(), t.double(), rule.divergence)
    assert 3e-5 < truth.mean() < 6e-5
    found = statistics(backend, z, t, rule)[states.DIVERGENCE]
    limit = 3e-5 if (backend, divergence) == ("torch", "jsd") else 1e-5
    assert ((found - truth) / truth).abs().max() < limit


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_divergence_is_negative(backend, divergence):
    """However small: in a literal sum of T (log T - log S) the rounding of its entries decides."""
    case = make(128, 1000, 16, divergence=divergence)
    for distance in (1e-3, 1e-5, 1e-7):
        near = case.__class__(
            **{**vars(case), "teacher": case.student * (1 + distance * torch.randn(128, 16))}
        )
        assert (near.fused(backend).per_token >= 0).all()
    apart = make(64, 1000, 16, divergence=divergence)
    apart = apart.__class__(**{**vars(apart), "weight": 30 * apart.weight})
    result = apart.fused(backend)
    exact = apart.to(torch.float64)
    truth, _ = reference.token_divergence(
        exact.student @ exact.weight.T, exact.teacher @ exact.weight.T, Divergence(divergence, 0.3)
    )
    assert relative_error(result.per_token, truth) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropies_of_peaked_distributions(backend):
    """1 + 1e-9 is 1 in fp32, and the logarithm of what is left is the entropy's largest part."""
    z = torch.randn(8, 5000)
    z[:, 7] = torch.arange(12.0, 28.0, 2.0)
    truth = reference.entropy(z.double().log_softmax(-1))
    state = statistics(backend, z, z, Rule())
    assert truth.min() < 2e-6
    for role in (states.STUDENT, states.TEACHER):
        assert ((states.entropy(state[role]) - truth) / truth).abs().max() < 1e-5
    # The same from tiles, of which the largest entry's comes first, last or between.
    for cuts in ((7,), (8,), (3, 100)):
        tiled = states.new(8, z, z.dtype)
        for columns in torch.arange(5000).tensor_split(cuts):
            part = Logits(z[:, columns].contiguous())
            load(backend).normalisers(part, part, Rule(), tiled)
        assert ((states.entropy(tiled[states.STUDENT]) - truth) / truth).abs().max() < 1e-5


# --- NaN stays NaN ---

# Quiet and signalling, of both signs, with bits that an integer addition carries into the exponent.
PAYLOADS = (0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00101, 0xFFD5A5A5)


@pytest.mark.parametrize("clip", [None, Clip("entry", 0.02), Clip("token", 0.3)], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_nan(backend, divergence, clip):
    """In either role, whatever its bits: of the token and of its gradient, and of no other."""
    for k, payload in enumerate(PAYLOADS):
        role, frozen, softcap = ("student", "teacher")[k % 2], k % 3 == 0, (None, 5.0)[k // 2 % 2]
        nan = torch.frombuffer(bytearray(struct.pack("<I", payload)), dtype=torch.float32)
        case = make(
            3,
            70,
            4,
            divergence=divergence,
            clip=clip,
            frozen=frozen,
            bias=True,
            transform=LogitTransform(softcap=softcap),
        ).require_grad()
        with torch.no_grad():
            getattr(case, role)[1, 2:3] = nan
        result = case.fused(backend)
        assert result.per_token[1].isnan() and result.per_token[[0, 2]].isfinite().all()
        result.loss.backward()
        assert result.loss.isnan() and case.student.grad[1].isnan().all()
        assert case.student.grad[[0, 2]].isfinite().all()
        if not frozen:
            assert case.weight.grad.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_tile(backend):
    """Any bits, in the products themselves."""
    for payload, divergence in itertools.product(PAYLOADS, DIVERGENCES):
        tiles = 3 * torch.randn(2, 4, 130)
        tiles[0, 1].view(torch.int32)[77] = payload - 2**32 if payload >= 2**31 else payload
        functions, rule = load(backend), Rule(Divergence(divergence))
        state, roles = states.new(4, tiles, torch.float32), [Logits(x) for x in tiles]
        functions.normalisers(*roles, rule, state)
        functions.sums(*roles, rule, state)
        functions.gradient_(*roles, rule, state, torch.ones(4))
        assert state[states.DIVERGENCE, 1].isnan() and tiles[0, 1].isnan().all()
        assert state[:, [0, 2, 3]].isfinite().all() and tiles[0, [0, 2, 3]].isfinite().all()


# --- Operands of 16 bits ---


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_far_roles_in_bf16_and_little_memory(backend, divergence):
    """A frozen head in tiles: dh is no difference of two products of rounded operands."""
    case = make(8, 3000, 64, divergence=divergence, frozen=True, budget=100_000)
    case = case.__class__(
        **{**vars(case), "teacher": (2 if divergence == "jsd" else -15) * case.teacher}
    ).to(torch.bfloat16)
    fused, exact = case.require_grad(), case.to(torch.float64).require_grad()
    result = fused.fused(backend)
    result.loss.backward()
    exact.dense().backward()
    assert divergence == "jsd" or result.per_token.mean() > 20
    assert relative_error(fused.student.grad, exact.student.grad) < 1e-2


def test_threads_leave_the_products_precision_alone(monkeypatch):
    """oneDNN's precision is the process's: threads that call at once must neither leave it changed
    nor compute each other's fp32 products in bf16, which only some processors would do.
    """
    monkeypatch.setattr(gemm, "_multiplies_bf16", lambda: True)
    settings, before = torch.backends.mkldnn.matmul, torch.backends.mkldnn.matmul.fp32_precision
    cases = [make(64, 2000, 64).to(dtype) for dtype in (torch.bfloat16, torch.float32) * 2]
    alone, failed = [case.fused("torch").per_token for case in cases], []

    def work(case, want) -> None:
        for _ in range(10):
            if not torch.equal(case.fused("torch").per_token, want):
                failed.append(case.student.dtype)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(cases, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and settings.fp32_precision == before
