"""Attention of single tokens in C++ against dense attention in fp64."""

import pytest
import torch
from helpers.processor import instruction_sets, using
from torch import nn

from opsd_kernels import attention

# Batch, groups, rows of a group, tokens, widths of a key and of a value, padding before.
SHAPES = [
    (1, 1, 1, 1, 16, 16, False),
    (2, 3, 3, 75, 64, 64, True),
    (3, 2, 7, 128, 80, 48, True),
    (1, 5, 4, 129, 256, 256, False),
    (2, 1, 8, 300, 96, 112, True),
    (4, 2, 2, 17, 192, 128, True),
    (1, 1, 5, 5000, 128, 64, True),
    (1, 2, 1, 257, 512, 512, True),
]


@pytest.fixture(params=instruction_sets("avx512", "avx2", "baseline"))
def instruction_set(request):
    with using(request.param):
        yield request.param


@pytest.fixture
def torch_alone(monkeypatch):
    """The calls that torch computes."""
    calls: list = []
    theirs = attention.TORCH
    monkeypatch.setattr(attention, "TORCH", lambda *a, **k: calls.append(a) or theirs(*a, **k))
    return calls


def tensors(batch, groups, rows, tokens, width, value_width, padded, dtype):
    """As a cache has them: at the start of larger tensors; and a mask of padding on the left. What
    the mask hides is NaN."""
    query = 3 * torch.randn(batch, groups, rows, width)
    key, value = (
        torch.randn(batch, groups, tokens + 9, w)[:, :, :tokens] for w in (width, value_width)
    )
    mask = None
    if padded:
        mask = torch.ones(batch, 1, 1, tokens + 5, dtype=torch.bool)[..., :tokens]
        for row in range(batch):
            hidden = row * tokens // (batch + 1) + (tokens > 140) * 131
            mask[row, ..., :hidden] = False
            key[row, :, :hidden] = value[row, :, :hidden] = torch.nan
    return (*(x.to(dtype) for x in (query, key, value)), mask)


def dense(query, key, value, mask, scale):
    """In fp64; hidden tokens have weight 0."""
    query, key, value = (x.double() for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) * scale
    if mask is not None:
        scores, value = scores.masked_fill(~mask, -torch.inf), value.nan_to_num()
    return scores.softmax(-1) @ value


def assert_exact(found, wanted):
    """To fp32's rounding, then to that of the tensors' type."""
    assert found.dtype in (torch.float32, torch.bfloat16)
    own = 2.0**-8 if found.dtype == torch.bfloat16 else 2.0**-24
    torch.testing.assert_close(found.double(), wanted, rtol=1.01 * own, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_dense_attention(shape, dtype, instruction_set, torch_alone):
    torch.manual_seed(0)
    *given, mask = tensors(*shape, dtype)
    scale = 1.3 * shape[4] ** -0.5
    with torch.no_grad():
        found = attention.attention(*given, mask, scale=scale)
    assert not torch_alone
    assert_exact(found, dense(*given, mask, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_windows_and_heads_beside_their_group(dtype, torch_alone):
    """Any tokens may be hidden; heads [B, H, 1, d] are those of a group [B, K, H / K, d]."""
    torch.manual_seed(0)
    query, key, value, _ = tensors(3, 2, 3, 400, 32, 32, False, dtype)
    mask = torch.rand(1, 1, 1, 400) < 0.3
    mask[..., :200] = False
    wanted = dense(query, key, value, mask, 32**-0.5)
    threads = torch.get_num_threads()
    with torch.no_grad():
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(attention.attention(query, key, value, mask))
        torch.set_num_threads(threads)
        heads = attention.attention(query.reshape(3, 6, 1, 32), key, value, mask, enable_gqa=True)
    assert torch.equal(*found) and torch.equal(found[0].view_as(heads), heads)
    assert_exact(found[0], wanted)
    assert not torch_alone


def test_what_sees_nothing_and_what_is_not_a_number():
    query, key, value, _ = tensors(3, 1, 2, 140, 16, 16, False, torch.bfloat16)
    mask = torch.ones(3, 1, 1, 140, dtype=torch.bool)
    mask[0] = False
    key[1], value[2, :, 7] = torch.nan, torch.inf
    with torch.no_grad():
        found = attention.attention(query, key, value, mask)
        wanted = attention.TORCH(query, key, value, mask)
    assert not found[0].any() and found[1].isnan().all() and found[2].isinf().all()
    torch.testing.assert_close(found, wanted, equal_nan=True)


def test_all_other_calls_are_torchs(torch_alone):
    """With the same result, or the same error."""
    torch.manual_seed(0)
    query, key, value, mask = tensors(2, 2, 3, 20, 16, 16, False, torch.float32)
    mask = torch.rand(2, 1, 1, 20) < 0.9
    cases = [
        ((query, key, value, mask.float()), {}),  # added to the scores
        ((query, key, value, mask.expand(2, 2, 1, 20)), {}),  # one for each head
        ((query, key, value, mask.expand(2, 1, 3, 20)), {}),  # one for each row
        ((query, key, value), {"is_causal": True}),
        ((query, key, value), {"dropout_p": 1.0}),
        ((query.double(), key.double(), value.double()), {}),
        ((query.half(), key.half(), value.half()), {}),
        ((query[..., :12], key[..., :12], value[..., :12]), {}),
        ((query, key.mT.contiguous().mT, value), {}),
        ((query.repeat(1, 1, 22, 1), key, value), {}),  # 66 rows
        ((query[0], key[0], value[0]), {}),
        ((query, key[:1], value), {}),
        ((query, key[:, :1], value[:, :1]), {}),
        ((query, key, value[:, :, :-1]), {}),
        ((query.to("meta"), key.to("meta"), value.to("meta")), {}),
    ]

    def result(function, given, named):
        try:
            return function(*given, **named)
        except (RuntimeError, ValueError) as error:
            return str(error)

    def check(cases):
        torch_alone.clear()
        for given, named in cases:
            found = result(attention.attention, given, named)
            wanted = result(nn.functional.scaled_dot_product_attention, given, named)
            same = found == wanted if isinstance(wanted, str) else found.shape == wanted.shape
            assert same and (isinstance(wanted, str) or wanted.is_meta or found.equal(wanted))
        assert len(torch_alone) == len(cases)

    check([((query, key, value), {})])  # with a gradient
    with torch.no_grad():
        check(cases)
        with torch.autocast("cpu", torch.bfloat16):
            check([((query, key, value, mask), {})])


def test_without_the_library_torch_computes_it(monkeypatch, torch_alone):
    query, key, value, mask = tensors(2, 2, 3, 20, 16, 16, True, torch.float32)
    monkeypatch.setattr(attention, "_kernel", lambda: None)
    with torch.no_grad():
        attention.attention(query, key.nan_to_num(), value.nan_to_num(), mask)
    assert len(torch_alone) == 1


def test_a_compiled_function_has_torchs_in_its_graph():
    query, key, value, mask = tensors(2, 2, 3, 20, 16, 16, False, torch.float32)
    with torch.no_grad(), attention.single_tokens():
        compiled = torch.compile(
            lambda *a: nn.functional.scaled_dot_product_attention(*a),
            fullgraph=True,
            backend="eager",
        )
        found = compiled(query, key, value, mask)
    assert_exact(found, dense(query, key, value, mask, 16**-0.5))


def test_torchs_function_is_there_again_afterwards():
    theirs = nn.functional.scaled_dot_product_attention
    assert theirs is attention.TORCH
    with pytest.raises(KeyError), attention.single_tokens():
        assert nn.functional.scaled_dot_product_attention is attention.attention
        raise KeyError
    assert nn.functional.scaled_dot_product_attention is theirs
