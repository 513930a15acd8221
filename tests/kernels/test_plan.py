"""The planner: pure arithmetic, and what a call really takes."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opsd_kernels.plan import DEFAULT_BUDGET, LEAST_COLUMNS, Cost, Plan, plan
from opsd_kernels.resolve import load
from opsd_kernels.sweep import Head, blocks, plan_call

COSTS = st.builds(
    Cost,
    entry=st.sampled_from([4, 8, 10, 16]),
    temporaries=st.sampled_from([0, 24]),
    slice_entries=st.integers(0, 10**6),
    token=st.integers(0, 10**5),
    gradient=st.sampled_from([0, 2]),
    group_token=st.integers(0, 10**5),
    one_pass_token=st.integers(0, 10**4),
    tiles_token=st.integers(0, 10**4),
    column=st.integers(0, 10**4),
    slice_columns=st.integers(0, 2000),
    fixed=st.integers(0, 10**7),
)


@given(st.integers(1, 10**4), st.integers(1, 3 * 10**5), COSTS, st.integers(0, 10**10))
def test_plans_cover_everything_within_the_budget(tokens, vocabulary, cost, extra):
    columns = min(vocabulary, LEAST_COLUMNS)
    budget = cost.bytes(1, columns, columns == vocabulary) + extra
    for grouped in (False, True):
        found = plan(tokens, vocabulary, cost, budget=budget, grouped=grouped and cost.gradient > 0)
        assert 1 <= found.rows <= found.group <= tokens
        spans = list(blocks(tokens, found))
        assert len(spans) == found.blocks and {*range(0, tokens, found.group)} <= {
            span.start for span in spans
        }
        assert [s.stop for s in spans] == [*(s.start for s in spans[1:]), tokens]
        assert (found.groups - 1) * found.group < tokens <= found.groups * found.group
        assert found.one_pass == (found.columns == vocabulary)
        assert found.group == found.rows or (grouped and found.one_pass)
        size = cost.bytes(found.rows, found.columns, found.one_pass, found.group)
        assert found.bytes == size <= budget


@given(st.integers(1, 10**5), COSTS, st.booleans(), st.integers(0, 10**10))
def test_the_most_rows_are_the_most(columns, cost, one_pass, budget):
    rows = cost.most_rows(columns, one_pass, budget)
    assert rows == 0 or cost.bytes(rows, columns, one_pass) <= budget
    assert cost.bytes(rows + 1, columns, one_pass) > budget


def test_one_pass_where_it_has_enough_rows():
    cost, row = Cost(entry=8), 8 * 32768
    assert plan(1000, 32768, cost, budget=16 * row) == Plan(16, 63, 32768, True, 16 * row, 16, 63)
    tiles = plan(1000, 32768, cost, budget=16 * row - 1)
    assert not tiles.one_pass and tiles.rows == 1000 and tiles.columns == 512
    assert plan(3, 32768, cost, budget=3 * row).one_pass  # as many rows as there are tokens
    assert not plan(3, 32768, cost, budget=3 * row - 1).one_pass
    assert not plan(1000, 32768, cost, budget=16 * row, fast_rows=17).one_pass


def test_tiles_follow_the_budget():
    cost = Cost(entry=8)
    # Wider where all tokens fit, narrower where rows would be fewer than columns.
    assert plan(16, 10**6, cost, budget=64 * 2**20).columns == 2**19
    small = plan(10**4, 10**6, cost, budget=2**20)
    assert (small.rows, small.columns) == (500, 256)
    assert plan(10**4, 10**6, cost, budget=8 * 64).rows == 1


def test_two_levels():
    """Few rows of fp32 logits, and the gradients of as many as the budget holds."""
    cost, v = Cost(entry=8, gradient=2), 151936
    found = plan(8192, v, cost, budget=2**30, fast_rows=256, grouped=True)
    assert found == Plan(256, 32, v, True, v * (8 * 256 + 2 * 2048), 2048, 4)
    alone = plan(8192, v, cost, budget=2**30, fast_rows=256)
    assert alone.group == alone.rows == 683
    whole = plan(8192, v, cost, budget=v * (8 * 256 + 2 * 8192), fast_rows=256, grouped=True)
    assert (whole.rows, whole.group, whole.groups) == (256, 8192, 1)


def on_a_gpu(tokens, trains_head, width=4096, vocabulary=151936, budget=None):
    hidden = torch.empty(1, dtype=torch.bfloat16, device="meta").expand(tokens, width)
    head = Head(hidden.new_empty(1).expand(vocabulary, width), None)
    options = {"two_sums": False, "vocabulary": vocabulary, "budget": budget}
    return plan_call(
        (hidden, hidden), (head, head), load("cuda"), trains_head=trains_head, **options
    )


def test_a_gpus_default_holds_all_gradients_where_their_sum_would_take_as_much():
    """In no more memory than blocks of 1 GiB beside dW in fp32."""
    v, d = 151936, 4096
    found = on_a_gpu(8192, True)
    assert (found.group, found.groups) == (8192, 1) and found.rows == 256
    assert found.bytes < 2**30 + 4 * v * d
    more = on_a_gpu(65536, True)
    assert more.groups > 1 and more.bytes <= 4 * v * d
    assert on_a_gpu(8192, True, budget=2**30).bytes <= 2**30
    # dh alone gains nothing from it; a narrow head's sum is small.
    assert on_a_gpu(8192, False).bytes <= 2**30
    assert on_a_gpu(8192, True, width=256).bytes <= 2**30


def test_one_byte_too_few():
    cost = Cost(entry=8, token=8)
    with pytest.raises(ValueError, match="memory_budget: got 519 bytes, must be at least 520"):
        plan(5, 1000, cost, budget=519)
    assert plan(5, 1000, cost, budget=520).rows == 1


def test_the_default_fits_any_vocabulary():
    assert plan(10, 10**9, Cost(entry=8)).bytes <= DEFAULT_BUDGET
    assert plan(10**5, 32768, Cost(entry=8)).bytes <= DEFAULT_BUDGET
    assert plan(10, 1000, Cost(entry=8, fixed=DEFAULT_BUDGET)).rows == 1
    assert plan(0, 1000, Cost(entry=8)).blocks == 0


MEASURE = """
import ctypes, json, os, sys, torch
from opsd_kernels import linear_divergence, linear_log_prob, sweep
torch.set_num_threads(1)
plans, plan = [], sweep.plan
sweep.plan = lambda *a, **k: plans.append(plan(*a, **k)) or plans[-1]
def resident(field):
    return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1]) * 1024
def measure(backend, divergence, train, dtype, budget):
    n, v, d, dtype = 112, 131072, 32, getattr(torch, dtype)
    h, t = torch.randn(n, d, dtype=dtype, requires_grad=True), torch.randn(n, d, dtype=dtype)
    w = torch.randn(v, d, dtype=dtype, requires_grad=train)
    def run():
        options = dict(memory_budget=budget, backend=backend)
        if divergence == "log_prob":
            targets = torch.arange(n)
            linear_log_prob(h, w, targets, reduction="mean", **options).log_prob.backward()
        else:
            linear_divergence(h, t, w, divergence=divergence, **options).loss.backward()
    run()  # libraries load, and keep buffers of their own
    h.grad = w.grad = None
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps would hide as much of the next call
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS")
    run()
    gradients = h.grad.nbytes + (w.grad.nbytes if train else 0)
    if train and plans[-1].blocks > 1 and dtype != torch.float32:
        gradients += 4 * w.numel()  # the sum over blocks
    took = resident("VmHWM") - before - gradients
    print(plans[-1].one_pass, took / plans[-1].bytes, flush=True)
# What torch imports at its first call, seconds a time, is the same for all.
linear_divergence(torch.ones(1, 8, requires_grad=True), *torch.ones(2, 1, 8)).loss.backward()
for case in json.loads(sys.argv[1]):
    if os.fork() == 0:  # a process for each: none finds what another has left
        measure(*case)
        os._exit(0)
    os.wait()
"""
MIB = 2**20
# backend, divergence, trained head, dtype, budget; one pass from 24 MiB on.
MEASURED = [
    ("cpp", "forward_kl", True, "float32", 80 * MIB),
    ("cpp", "jsd", False, "float32", 24 * MIB),
    ("cpp", "jsd", True, "float32", 12 * MIB),
    ("cpp", "jsd", False, "float32", 8 * MIB),
    ("cpp", "forward_kl", False, "bfloat16", 12 * MIB),
    ("torch", "jsd", False, "float32", 96 * MIB),
    ("torch", "forward_kl", True, "float32", 24 * MIB),
    ("torch", "jsd", False, "float32", 24 * MIB),
    ("torch", "reverse_kl", False, "float32", 16 * MIB),
    ("torch", "jsd", True, "float32", 16 * MIB),
    ("cpp", "forward_kl", True, "bfloat16", 32 * MIB),
    ("torch", "log_prob", False, "float32", 8 * MIB),
]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_planned_bytes_are_what_it_takes():
    # -P: the installed package, not the checkout that pytest may have been started in.
    command = [sys.executable, "-P", "-c", MEASURE, json.dumps(MEASURED)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for case, line in zip(MEASURED, lines, strict=True):
        one_pass, ratio = line.split()
        assert (one_pass == "True") == (case[-1] >= 24 * MIB), (case, line)
        # A MiB: products have buffers of their own, and more of them on CPUs without AVX-512.
        assert abs(float(ratio) - 1) * case[-1] < 0.1 * case[-1] + MIB, (case, line)
