"""What only a GPU can show. The cases that every device has are those of the other modules, whose
`BACKENDS` name the GPU's too.

python -m pytest tests/kernels -m gpu
"""

import pytest
import torch
from helpers.kernel_cases import DIVERGENCES, GPU_BACKENDS, make, on_gpu

from opsd_kernels import (
    Clip,
    Divergence,
    backends,
    linear_divergence,
    linear_log_prob,
)
from opsd_kernels.divergence import Rule
from opsd_kernels.resolve import load
from opsd_kernels.tiles import state as states
from opsd_kernels.tiles.logits import Logits

pytestmark = list(on_gpu)


@pytest.fixture(params=GPU_BACKENDS)
def backend(request):
    """Its name; tensors are made on the GPU."""
    assert (reason := backends()[str(request.param)]) is None, reason
    with torch.device("cuda"):
        yield request.param


def gradients(case, backend):
    loss = case.fused(backend).loss
    return loss.detach(), *torch.autograd.grad(loss, (case.student, case.weight))


def equal(runs) -> bool:
    return all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_runs_are_equal_bit_for_bit(backend, divergence):
    case = make(300, 20011, 64, divergence=divergence).to(torch.bfloat16).require_grad()
    assert equal([gradients(case, backend) for _ in range(2)])


def test_another_stream(backend):
    """The work waits for what its stream has queued, and runs there."""
    case = make(64, 8009, 64, divergence="jsd")
    expected = gradients(case.require_grad(), backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # some 50 ms: work on another stream would overtake it
        late = make(64, 8009, 64, divergence="jsd").require_grad()
        for name in ("student", "teacher", "weight"):
            getattr(late, name).detach().copy_(getattr(case, name))
        got = gradients(late, backend)
    stream.synchronize()
    assert equal([got, expected])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_cuda_graph(backend, divergence):
    """Nothing in a call waits for the device, so that it can be captured; a replay sees new
    inputs.
    """
    case = make(48, 5003, 32, divergence=divergence, clip=Clip("token", 0.3)).require_grad()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up outside of a capture
        for _ in range(2):
            gradients(case, backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(case, backend)
    for _ in range(2):
        with torch.no_grad():
            case.student.copy_(torch.randn_like(case.student))
        graph.replay()
        torch.cuda.synchronize()
        assert equal([captured, gradients(case, backend)])


def test_nothing_waits_for_the_device(backend):
    """Without token weights; with them, once, for the count of those that are not 0."""
    case = make(48, 5003, 32, divergence="jsd", clip=Clip("token", 0.3)).require_grad()
    weighted = case.__class__(**{**vars(case), "token_weight": torch.rand(48)})
    for c in (case, weighted):
        gradients(c, backend)  # compiles, and sets libraries up
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(case, backend)
        with pytest.raises(RuntimeError, match="synchroniz"):
            gradients(weighted, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_offsets_beyond_two_to_the_31(name):
    """The last of rows a long way apart: n * stride = 2^31 + some."""
    assert (reason := backends()[name]) is None, reason
    rows, v, stride = 3, 4099, 2**30 + 5
    if torch.cuda.mem_get_info()[0] < 3 * 4 * stride * (rows - 1):
        pytest.skip("needs 26 GB of free GPU memory")
    functions, rule = load(name), Rule(Divergence("jsd"))
    with torch.device("cuda"):
        apart = [
            torch.empty((rows - 1) * stride + v).as_strided((rows, v), (stride, 1))
            for _ in range(2)
        ]
        close = [torch.randn(rows, v) for _ in range(2)]
        for x, y in zip(apart, close, strict=True):
            x.copy_(y)
        found = []
        for tiles in (apart, close):
            state = states.new(rows, tiles[0], torch.float32)
            roles = [Logits(x) for x in tiles]
            functions.normalisers(*roles, rule, state)
            functions.sums(*roles, rule, state)
            functions.gradient_(*roles, rule, state, torch.ones(rows))
            found.append((state, tiles[0]))
    assert equal(found)


def test_a_vocabulary_of_many_tokens(backend):
    """N V = 2^31 + some logits of each role, in blocks; the loss is that of one block alone."""
    n, v = 16400, 131072
    hidden = torch.randn(n, 16, dtype=torch.bfloat16)
    weight = torch.randn(v, 16, dtype=torch.bfloat16)
    teacher = hidden + 0.3 * torch.randn_like(hidden)
    result = linear_divergence(hidden, teacher, weight, backend=backend)
    some = slice(n - 5, n)
    alone = linear_divergence(hidden[some], teacher[some], weight, backend=backend)
    torch.testing.assert_close(result.per_token[some], alone.per_token, rtol=1e-4, atol=1e-6)
    assert result.per_token.isfinite().all()


def test_memory_stays_within_the_budget(backend):
    n, v, d, budget = 2048, 50257, 256, 256 * 2**20
    hidden, weight = torch.randn(n, d, dtype=torch.bfloat16), torch.randn(v, d).bfloat16()
    hidden.requires_grad_()
    linear_divergence(hidden[:8], hidden[:8].detach(), weight, backend=backend)  # workspaces
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_divergence(hidden, hidden.detach(), weight, memory_budget=budget, backend=backend)
    extra = torch.cuda.max_memory_allocated() - before - hidden.numel() * 2
    assert 0.5 * budget < extra <= 1.1 * budget


def test_log_prob_targets_of_every_chunk(backend):
    v = 9001
    hidden, weight = torch.randn(64, 32), torch.randn(v, 32)
    targets = torch.cat((torch.tensor([0, v - 1, 2047, 2048, 4095, 4096]), torch.arange(58) * 155))
    got = linear_log_prob(hidden, weight, targets, backend=backend).log_prob
    want = (hidden.double() @ weight.double().T).log_softmax(-1)[torch.arange(64), targets]
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
