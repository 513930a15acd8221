"""Packed attention on a GPU: each kernel that runs there against fp64, and whole models.

python -m pytest tests -m gpu
"""

import pytest
import torch
from helpers.prefix_models import MODELS, make, make_groups

from opsd.prefix import attention, shared_prefix_hidden_states, try_kernel, use_kernel
from opsd.prefix.attention import Inputs, obstacle
from opsd.prefix.layout import Layout, Scores

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

GROUPS = [
    ([5] * 700, [[6] * n for n in (300, 1, 77, 256)]),
    ([5], [[6]]),
    ([5] * 130, [[6] * n for n in (2, 129)]),
]
PASTS = {"no past": None, "past of some": [0, 40, 300]}


@pytest.fixture(autouse=True)
def restored():
    yield
    use_kernel("auto")


def results(name, layout, window, softcap, width, dtype):
    draw = torch.Generator().manual_seed(3)
    rows = layout.past + len(layout.ids)
    shapes = (
        (len(layout.ids), 8, width),
        (rows, 2, width),
        (rows, 2, width),
        (
            len(layout.ids),
            8,
            width,
        ),
    )
    # Rounded to bf16 for all, so that the truth is of the same numbers.
    *inputs, d_out = (
        torch.randn(s, generator=draw).to("cuda", torch.bfloat16).to(dtype) for s in shapes
    )
    for x in inputs:
        x.requires_grad_()
    out = attention.KERNELS[name](*inputs, layout, Scores(width**-0.5, window, softcap))
    return [x.double() for x in (out, *torch.autograd.grad(out, inputs, d_out))]


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize("name", ["flash", "flash_3", "flash_attn", "flex"])
def test_kernels_are_as_near_to_the_truth_as_tiles_are(name, past, window, softcap, width):
    device = torch.device("cuda", torch.cuda.current_device())
    reason = obstacle(name, Inputs(device, torch.bfloat16, width, width, softcap is not None))
    if reason:
        pytest.skip(reason)
    attention.choose(name, Inputs(device, torch.bfloat16, width, width, softcap is not None))
    layout = Layout(GROUPS, device, PASTS[past])
    arguments = (layout, window, softcap, width)
    truth = results("tiles", *arguments, torch.float64)
    found, peer = (results(n, *arguments, torch.bfloat16) for n in (name, "tiles"))
    for what, x, y, true in zip(("out", "dq", "dk", "dv"), found, peer, truth, strict=True):
        error, rounding = (x - true).norm() / true.norm(), (y - true).norm() / true.norm()
        assert error <= 2 * rounding + 2**-9, what


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["qwen3", "mistral, window", "gemma 2, soft caps", "gemma 3"])
def test_models_train_as_in_fp32_but_for_rounding(name, checkpointing):
    """By the kernel that `auto` takes; the truth is the same stream by tiles in fp32."""
    kind, sizes = MODELS[name]
    model = make(kind, {**sizes, "head_dim": 16}).cuda().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    groups = make_groups()
    found = {}
    for key, kernel, dtype in (
        ("truth", "tiles", torch.float32),
        ("tiles", "tiles", torch.bfloat16),
        ("auto", "auto", torch.bfloat16),
    ):
        use_kernel(kernel)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            states = shared_prefix_hidden_states(model, groups)
        gradients = gradient_of(model, states.float())
        found[key] = torch.cat([states.float().flatten(), gradients])
    assert try_kernel(model, torch.bfloat16, model.device) != "tiles"
    error, rounding = ((found[k] - found["truth"]).norm() for k in ("auto", "tiles"))
    assert error <= 2 * rounding


def gradient_of(model, states):
    model.zero_grad()
    draw = torch.Generator().manual_seed(9)
    (states * torch.randn(states.shape, generator=draw).to(states.device)).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_nothing_is_copied_for_each_rollout():
    """The prefix's keys serve all its rollouts where they are: memory is linear in the stream."""
    device = torch.device("cuda", torch.cuda.current_device())
    peaks = []
    for rollouts in (2, 16):
        layout = Layout([([5] * 8192, [[6] * 65] * rollouts)], device)
        rows = len(layout.ids)
        q, k, v = (
            torch.randn(rows, 8, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = attention.KERNELS["flash"](q, k, v, layout, Scores(0.125))
        out.sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 1.25 * peaks[0]  # 13 % more tokens; copies would be 14 times the keys
