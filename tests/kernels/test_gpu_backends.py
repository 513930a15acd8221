"""The GPU backends, on a GPU where there is one. Elsewhere their kernels run all the same: Triton's
in its interpreter, CUDA's sources compiled for the CPU (emulated/cuda_runtime.h).
"""

import ctypes
import importlib.util
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.gpu_rounding import emulate_gpu_products
from helpers.kernel_cases import DIVERGENCES, KINDS, LIMITS, check, make, relative_error
from helpers.tile_cases import CLIPS, TRANSFORMS, N, far_apart, leaves_in_16_bits, problem, sweep

from opsd_kernels import (
    Clip,
    LogitTransform,
    linear_divergence,
    linear_log_prob,
    operator,
    reference,
    resolve,
)
from opsd_kernels.divergence import Rule
from opsd_kernels.divergence_loop import token_factor
from opsd_kernels.plan import plan
from opsd_kernels.tiles import cuda, triton
from opsd_kernels.tiles import state as states
from opsd_kernels.tiles.logits import Logits

DEVICE = "cuda" if torch.cuda.device_count() else "cpu"
ROOT = Path(__file__).parents[2]
# The interpreter's numpy, at the infinities that kernels then replace.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),  # among `pytest -m gpu`
]
QUEUE = cuda._queue


@pytest.fixture(scope="module")
def emulated_library(tmp_path_factory) -> Path:
    library = tmp_path_factory.mktemp("cuda") / "libopsd_cuda.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wextra"]
    flags += ["-Werror", "-Wno-unknown-pragmas", "-I", str(Path(__file__).parent / "emulated")]
    flags += ["-DOPSD_ROW_BYTES=9000"]  # so that 1025 entries take two blocks of a cluster
    source = ["-x", "c++", str(ROOT / "csrc" / "cuda.cu")]
    subprocess.run(["g++", *flags, *source, "-o", str(library)], check=True)
    return library


@pytest.fixture(params=["triton", "cuda"])
def backend(request, monkeypatch):
    """Its name; tensors are made where it serves."""
    name = request.param
    if name == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("there is no triton for this platform")
    if DEVICE == "cuda":
        assert resolve.backends()[name] is None, resolve.backends()[name]
    if DEVICE == "cpu" and name == "triton":
        assert triton.INTERPRETED  # by tests/conftest.py
    elif DEVICE == "cpu":
        monkeypatch.setattr(cuda, "LIBRARY", request.getfixturevalue("emulated_library"))
        monkeypatch.setattr(cuda, "_queue", lambda device: (0, None))
        monkeypatch.setitem(resolve._BACKENDS, "cuda", None)
        monkeypatch.setattr(resolve, "_serves_cpu", lambda name: True)
        cuda._library.cache_clear()
    with torch.device(DEVICE):
        yield name
    cuda._library.cache_clear()


@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("transform", ["plain", "capped"])  # test_options scales
def test_tiles(backend, monkeypatch, transform, clip, divergence):
    """Two tiles of three chunks (Triton's are as small as 256 here), and the whole row at once."""
    tensors, row_weight = problem(biased=transform != "plain"), torch.rand(N)
    rule = Rule(KINDS[divergence], TRANSFORMS[transform], CLIPS[clip])
    truth = sweep("torch", tensors, (), rule, row_weight, torch.float64, True)
    for chunk, cuts, early in ((256, (600,), True), (2048, (), clip == "entry")):
        monkeypatch.setattr(triton, "CHUNK", chunk)
        state, gradient = sweep(backend, tensors, cuts, rule, row_weight, torch.float32, early)
        torch.testing.assert_close(state.double(), truth[0], rtol=2e-5, atol=1e-4)
        torch.testing.assert_close(gradient.double(), truth[1], rtol=2e-5, atol=2e-5)
        assert state[states.DIVERGENCE, 1] == 0 and state[states.COUNT, 1] == 0
        assert not gradient[1].any() or clip == "entry"


@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("clip", [None, Clip("entry", 0.002), Clip("token", 0.1)], ids=str)
@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_a_row_at_once(backend, clip, divergence):
    """In a cluster of blocks, each with a part of the row (here of 1024 entries, on a GPU of up to
    12 000), or one block; into the products or 16 bits; with and without a gradient.
    """
    widest = 4099 if DEVICE == "cpu" else 151936
    for v, transform in ((widest, "plain"), (1043, "capped"), (17, "scaled")):
        biases = torch.randn(2, v) if transform == "capped" else (None, None)
        student = 2 * torch.randn(N, v)
        teacher = student + 0.5 * torch.randn(N, v)
        teacher[:, v // 2 :: 7] -= 30
        teacher[1] = student[1]
        if biases[0] is not None:
            biases[1][:] = biases[0]
        rule, row_weight = Rule(KINDS[divergence], TRANSFORMS[transform], clip), torch.rand(N)
        target_weight = torch.tensor([0.7, 0.0, -2.0]) * (clip is None)

        def run(name, dtype, *more, rule=rule, roles=(student, teacher, *biases), by=target_weight):
            student, teacher, *biases = (x if x is None else x.to(dtype, copy=True) for x in roles)
            roles = Logits(student, biases[0]), Logits(teacher, biases[1])
            state = states.new(N, student, dtype)
            state[states.TARGET_WEIGHT] = by
            if name == "cuda":
                assert cuda.row_fits(student.device, student.shape[1])
                cuda.rows(*roles, rule, state, *more)
                return state, student
            dense, (factor,) = resolve.load(name), more
            dense.normalisers(*roles, rule, state)
            dense.sums(*roles, rule, state)
            if rule.token_clip is not None:
                factor = factor * token_factor(state, rule.token_clip)
            dense.gradient_(*roles, rule, state, factor)
            return state, student

        state, gradient = run("torch", torch.float64, row_weight.double())
        found, written = run("cuda", torch.float32, row_weight)
        torch.testing.assert_close(found.double(), state, rtol=2e-5, atol=1e-4)
        torch.testing.assert_close(written.double(), gradient, rtol=2e-5, atol=2e-5)
        assert found[states.DIVERGENCE, 1] == 0
        assert not written[1].any() or rule.entry_clip is not None
        narrow = torch.empty(N, v, dtype=torch.bfloat16)
        again, _ = run("cuda", torch.float32, row_weight, narrow)
        assert torch.equal(again, found) and torch.equal(narrow, written.bfloat16())
        again, untouched = run("cuda", torch.float32, None)
        assert torch.equal(untouched, student)
        torch.testing.assert_close(again, found, rtol=1e-6, atol=1e-6)


def test_gradients_in_16_bits(backend):
    leaves_in_16_bits(backend)


def test_groups_of_blocks(backend, monkeypatch):
    """Their gradients wait in 16 bits for one product, here of two blocks."""
    budget = 58_000
    if DEVICE == "cpu":
        emulate_gpu_products(monkeypatch)
    else:
        monkeypatch.setattr("opsd_kernels.sweep.FAST_ROWS", 16)
    plans = []

    def recorded(*arguments, **options):
        plans.append(plan(*arguments, **options))
        return plans[-1]

    monkeypatch.setattr("opsd_kernels.sweep.plan", recorded)
    check(make(19, 301, 8, budget=budget), torch.bfloat16, backend)
    assert any(p.group > p.rows for p in plans)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_weights_of_a_mean_over_many_tokens(backend, monkeypatch, divergence):
    """1/8192 a token, far from fp16's range, and weights far from the others': gradients that the
    kernels write in 16 bits neither vanish nor overflow.
    """
    if DEVICE == "cpu":
        emulate_gpu_products(monkeypatch)
    token_weight = torch.full((8,), 1 / 8192)
    token_weight[:3] *= torch.tensor([1e-3, 0.0, 30.0])
    for dtype, limit in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        case = make(8, 301, 16, divergence=divergence, reduction="sum").to(dtype)
        case = replace(case, token_weight=token_weight)
        fused, exact = case.require_grad(), case.to(torch.float64).require_grad()
        scale = 2.0**16 if dtype == torch.float16 else 1.0
        (fused.fused(backend).loss * scale).backward()
        exact.dense().backward()
        for got, want in zip(fused.trainable(), exact.trainable(), strict=True):
            assert relative_error(got.grad.double() / scale, want.grad) < limit
        assert fused.student.grad[0].any()


# One entry more than two chunks; a vocabulary no vector length divides; one token, one entry more
# than a power of two.
@pytest.mark.parametrize("shape", [(2, 4097, 8), (5, 37, 16), (1, 129, 8)], ids=str)
@pytest.mark.parametrize("divergence", KINDS)
def test_shapes_and_dtypes(backend, divergence, shape):
    case = make(*shape, divergence=divergence, budget=3 * shape[1] * 8 + 4096)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check(case, dtype, backend)


@pytest.mark.parametrize("clip", [None, Clip("entry", 0.02), Clip("token", 0.3)], ids=str)
@pytest.mark.parametrize("divergence", KINDS)
def test_options(backend, divergence, clip):
    for reduction, softcap in (("mean", 5.0), ("none", None)):
        v = 2110 if softcap else 67  # several chunks, and one
        case = make(
            4,
            v,
            16,
            bias=True,
            divergence=divergence,
            clip=clip,
            reduction=reduction,
            transform=LogitTransform(1.3, 0.7, softcap),
            teacher_weight=torch.randn(v, 16) if softcap else None,
            token_weight=torch.rand(4) * (torch.arange(4) % 3 != 0),
        )
        check(case, torch.float32, backend)


@pytest.mark.parametrize("divergence", KINDS)
class TestEdges:
    def test_identical_rows_are_exactly_zero(self, backend, divergence):
        case = make(4, 301, 16, divergence=divergence, bias=True).require_grad()
        result = linear_divergence(
            case.student,
            case.student.detach(),
            case.weight,
            bias=case.bias,
            divergence=case.divergence,
            beta=case.beta,
            logit_scale=0.3,
            backend=backend,
        )
        assert not result.per_token.any()
        result.loss.backward()
        assert not case.student.grad.any() and not case.weight.grad.any()

    def test_padded_vocabulary(self, backend, divergence):
        """-inf in both roles, over more than a whole chunk: in values, gradients and entropies."""
        case = make(3, 4500, 8, divergence=divergence).require_grad()
        bias = torch.zeros(4500)
        bias[40:] = -torch.inf
        padded = linear_divergence(
            case.student,
            case.teacher,
            case.weight,
            bias=bias,
            divergence=case.divergence,
            beta=case.beta,
            backend=backend,
        )
        inputs = case.student, case.weight
        short = replace(case, weight=case.weight[:40])
        found = short.fused(backend)
        for name in ("loss", "student_entropy", "teacher_entropy"):
            torch.testing.assert_close(getattr(padded, name), getattr(found, name))
        for x, y in zip(
            torch.autograd.grad(padded.loss, inputs),
            torch.autograd.grad(found.loss, inputs),
            strict=True,
        ):
            torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)

    def test_huge_logits(self, backend, divergence):
        """+-1e4, from integers: exact in fp32, so that only the statistics can err."""
        case = make(8, 300, 4, divergence=divergence)
        case.student[:] = torch.randint(-40, 40, (8, 4))
        case.teacher[:] = case.student + torch.randint(-1, 2, (8, 4))
        case.weight[:] = torch.randint(-70, 70, (300, 4))
        assert (case.student @ case.weight.T).abs().max() > 5e3
        check(case, torch.float32, backend)

    def test_nan_is_seen_where_it_is(self, backend, divergence):
        case = make(3, 33, 8, divergence=divergence)
        case.student[1, 3] = torch.nan
        per_token = case.fused(backend).per_token
        assert per_token[1].isnan() and per_token[[0, 2]].isfinite().all()

    def test_no_tokens(self, backend, divergence):
        case = make(0, 33, 8, divergence=divergence).require_grad()
        case.fused(backend).loss.backward()
        assert not case.weight.grad.any()


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable head", "frozen head"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_log_prob(backend, softcap, frozen):
    n, v = 4, 2100
    for dtype in (torch.float32, torch.bfloat16):
        case = make(n, v, 8, bias=True).to(dtype)
        fused, plain = case.require_grad(), case.to(torch.float64).require_grad()
        for c in (fused, plain):
            c.weight.requires_grad_(not frozen)
            c.bias.requires_grad_(not frozen)
        targets = torch.tensor([0, v - 1, 2047, 2048])
        result = linear_log_prob(
            fused.student,
            fused.weight,
            targets,
            bias=fused.bias,
            temperature=1.2,
            logit_scale=0.9,
            logit_softcap=softcap,
            memory_budget=2 * v * 4 + v * 8 * 4 + 4096,  # two tokens a block
            backend=backend,
        )
        truth, entropy = reference.linear_log_prob(
            plain.student,
            plain.weight,
            targets,
            bias=plain.bias,
            transform=LogitTransform(1.2, 0.9, softcap),
        )
        upstream = torch.randn(n)
        for x, y in ((result.log_prob, truth), (result.entropy, entropy)):
            assert relative_error(x, y) <= LIMITS[torch.float32][0]
        got, want = (
            torch.autograd.grad(x, [p for p in c.trainable() if p.requires_grad], u)
            for x, c, u in (
                (result.log_prob, fused, upstream),
                (truth, plain, upstream.double()),
            )
        )
        for x, y in zip(got, want, strict=True):
            assert relative_error(x, y) <= LIMITS[dtype][1]


def test_runs_are_equal_bit_for_bit(backend):
    case = make(3, 4100, 8, divergence="jsd").require_grad()
    runs = []
    for _ in range(2):
        loss = case.fused(backend).loss
        runs.append([loss.detach(), *torch.autograd.grad(loss, (case.student, case.weight))])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_the_incoming_scalar(backend, monkeypatch):
    """Gradients are scaled where it is on the device, without waiting for it; 1 reads nothing."""
    monkeypatch.setattr(triton, "SCALED", 256)
    for dtype in (torch.float32, torch.bfloat16):
        for factor in (1.0, -0.3, torch.inf, torch.nan):
            x = torch.randn(3, 301).to(dtype)
            got, by = x.clone(), torch.tensor(factor)
            triton.scale_(got, by)
            near = 0.0 if dtype == torch.float32 or factor == 1 else 2**-7  # the interpreter cuts
            torch.testing.assert_close(got, x * by, rtol=near, atol=0, equal_nan=True)
    triton.scale_(torch.empty(0), torch.tensor(2.0))
    calls = []
    monkeypatch.setattr(operator, "scaler", lambda device: lambda x, by: calls.append(x.mul_(by)))
    case = make(5, 301, 8).require_grad()
    wanted = torch.autograd.grad(case.dense(), case.trainable())
    # With retain_graph=True the saved gradients stay as they are.
    for keeps, count in ((True, 0), (False, 3)):
        loss = 0.7 * case.fused(backend).loss
        found = torch.autograd.grad(loss, case.trainable(), retain_graph=keeps)
        assert len(calls) == count
        for x, y in zip(found, wanted, strict=True):
            assert relative_error(x, 0.7 * y) < 1e-5


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU: test_gpu.py")
@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_launches_are_on_the_tensors_device_and_stream(backend, monkeypatch):
    """Which need not be the current device; two streams by turns."""
    of_stream = {3: 41, 1: 42}
    monkeypatch.setattr(
        torch.cuda,
        "current_stream",
        lambda device: SimpleNamespace(cuda_stream=of_stream[device.index]),
    )
    library = cuda._library()
    device, stream = ctypes.c_int(), ctypes.c_void_p()
    place = ctypes.byref(device), ctypes.byref(stream)
    library.emulated_launches(0, *place, 1)
    for divergence, index in zip((*DIVERGENCES, *DIVERGENCES), (3, 1, 3, 1, 1, 3), strict=True):
        monkeypatch.setattr(cuda, "row_fits", lambda device, v, fits=index == 3: fits)
        monkeypatch.setattr(cuda, "_queue", lambda _, i=index: QUEUE(torch.device("cuda", i)))
        for clip in (None, Clip("entry", 0.02)):
            case = make(3, 301, 8, divergence=divergence, clip=clip).require_grad()
            case.fused(backend).loss.backward()
        linear_log_prob(
            case.student, case.weight, torch.arange(3), backend=backend
        ).log_prob.sum().backward()
        count = library.emulated_launches(0, *place, 0)
        assert count > (6 if index == 3 else 10)
        for k in range(count):
            library.emulated_launches(k, *place, k == count - 1)
            assert (device.value, stream.value) == (index, of_stream[index])


def test_offsets_beyond_two_to_the_31(backend, tmp_path):
    """On a GPU: test_gpu.py."""
    if DEVICE == "cpu":
        far_apart(backend, tmp_path)
