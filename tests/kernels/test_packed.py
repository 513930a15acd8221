"""Linear layers by packed weights in C++ against dense products in fp64."""

import pytest
import torch
from helpers.processor import instruction_sets, using
from torch import nn

from opsd_kernels import packed

pytestmark = pytest.mark.skipif(not packed._kernels(), reason="a processor with AVX2")


def layer(outputs, inputs, bias=True, dtype=torch.bfloat16):
    made = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    assert packed.packable(made)
    return made


@pytest.fixture
def torch_alone(monkeypatch):
    """The calls that torch computes."""
    calls: list = []
    theirs = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *a: calls.append(a) or theirs(*a))
    return calls


@pytest.fixture(params=instruction_sets("avx512", "avx2"))
def instructions(request):
    with using(request.param):
        yield


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "dtype, inputs",
    [(torch.bfloat16, n) for n in (2, 34, 576)] + [(torch.float32, 1), (torch.float32, 577)],
)
@pytest.mark.parametrize("outputs", [1, 16, 47, 48, 99, 192])
def test_it_is_the_dense_product(outputs, dtype, inputs, bias, instructions, torch_alone):
    torch.manual_seed(0)
    made = layer(outputs, inputs, bias, dtype)
    rounding = torch.finfo(dtype).eps / 2
    for rows in (0, 1, 2, 3, 7, 8, 32, 45):
        x = torch.randn(rows, 1, inputs, dtype=dtype)
        with torch.no_grad(), packed.packed_weights([made]):
            found = made(x)
        wanted = x.double() @ made.weight.double().T + (made.bias.double() if bias else 0)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=1.01 * rounding, atol=1e-5)
    assert not torch_alone


def test_threads_and_inputs_that_are_part_of_a_tensor(torch_alone):
    torch.manual_seed(0)
    made, threads, found = layer(200, 64), torch.get_num_threads(), []
    whole = torch.randn(9, 5, 131, dtype=torch.bfloat16)
    for count in (1, 2):
        torch.set_num_threads(count)
        with torch.no_grad(), packed.packed_weights([made]):
            found += [made(whole[:, 2, 1:65]), made(whole[:, 2, 1:65].clone())]
    torch.set_num_threads(threads)
    assert all(torch.equal(found[0], x) for x in found) and not torch_alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_stays_in_its_rows_and_outputs(dtype):
    torch.manual_seed(0)
    made, x = layer(50, 8, dtype=dtype), torch.randn(10, 8, dtype=dtype)
    x[3, 2], x[9, 0] = torch.nan, torch.inf
    with torch.no_grad():
        made.weight[7] = torch.nan
        wanted = x.float() @ made.weight.float().T + made.bias.float()
        with packed.packed_weights([made]):
            found = made(x).float()
    assert found[3].isnan().all() and found[:, 7].isnan().all()
    torch.testing.assert_close(found, wanted, rtol=0.01, atol=1e-3, equal_nan=True)


def test_all_other_calls_are_torchs(torch_alone):
    torch.manual_seed(0)
    made, x = layer(20, 8), torch.randn(3, 8, dtype=torch.bfloat16)
    wanted = made(x)
    with packed.packed_weights([made]):
        made(x).sum().backward()
        with torch.no_grad():
            with pytest.raises(RuntimeError):
                made(x.float())
            with pytest.raises(RuntimeError):
                made(x[:, :6])
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(made(x.float()), wanted)
            compiled = torch.compile(made, fullgraph=True, backend="eager")
            assert torch.equal(compiled(x), wanted)
    assert made.weight.grad is not None and len(torch_alone) >= 5


def test_weights_are_copied_at_the_start_and_given_back(torch_alone):
    made, x = layer(20, 8), torch.ones(3, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        with pytest.raises(KeyError), packed.packed_weights([made]):
            before = made(x)
            made.weight.zero_()
            assert torch.equal(made(x), before) and not packed.packable(made)
            raise KeyError
        assert packed.packable(made) and torch.equal(made(x), made.bias.expand(3, 20))
    assert len(torch_alone) == 1


def test_which_layers_can_be_packed(monkeypatch):
    assert packed.packable(nn.Linear(7, 8))
    assert not packed.packable(nn.Linear(7, 8, dtype=torch.bfloat16))
    assert not packed.packable(nn.Linear(8, 8, dtype=torch.float64))
    assert not packed.packable(nn.Linear(8, 8, dtype=torch.bfloat16, device="meta"))
    assert not packed.packable(nn.Embedding(8, 8, dtype=torch.bfloat16))
    strange = nn.Linear(8, 8, dtype=torch.bfloat16)
    strange.weight = nn.Parameter(torch.randn(8, 8, dtype=torch.bfloat16).T)
    assert not packed.packable(strange)
    monkeypatch.setattr(packed, "_kernels", tuple)
    assert not packed.packable(nn.Linear(8, 8, dtype=torch.bfloat16))
