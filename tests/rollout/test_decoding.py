"""What makes decoding faster changes numbers by rounding at most."""

import pytest
import torch
from helpers.tiny_models import tiny_model
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from opsd.models.copies import copy_model
from opsd.rollout import ContinuousSampler, GenerateSampler, Sampling, read_once
from opsd.rollout.decoding import Roomy, decodes_fast
from opsd_kernels import attention as kernel
from opsd_kernels import packed


def states(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 2, count, 4), torch.randn(3, 2, count, 6)


def test_a_cache_with_room_holds_what_one_without_holds():
    torch.manual_seed(0)
    plain = DynamicLayer()
    plain.update(*states(5))
    roomy = Roomy(plain)
    for step in range(300):
        new = states(200 if step == 120 else 1)
        for kept, wanted in zip(roomy.update(*new), plain.update(*new), strict=True):
            assert torch.equal(kept, wanted)
        if step == 40:
            for layer in (plain, roomy):
                layer.batch_select_indices(torch.tensor([2, 0, 1]))
        if step == 80:
            for layer in (plain, roomy):
                layer.crop(-7)
    assert roomy.get_seq_length() == plain.get_seq_length()
    assert torch.equal(roomy.keys, plain.keys) and torch.equal(roomy.values, plain.values)


def test_a_decoded_token_copies_no_cache():
    model = tiny_model("llama").eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), decodes_fast(model, 1):
        for _ in range(3):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        before = [layer.keys.data_ptr() for layer in cache.layers]
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    assert before == [layer.keys.data_ptr() for layer in cache.layers]
    assert cache.get_seq_length() == 4 and not model._forward_hooks


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bloom", "gpt_neo", "jamba", "lfm2"])
def test_packed_weights_write_the_same_tokens(family, monkeypatch):
    """In longer rollouts than the cache has room for at first, with the same random numbers; after
    the weights change, with the new ones."""
    torch.manual_seed(0)
    model = copy_model(tiny_model(family), torch.bfloat16)
    contexts = [torch.randint(5, 30, (length,)).tolist() for length in (17, 3, 9)]
    sampler, sampling = GenerateSampler(model, frozenset([4])), Sampling(90, temperature=1.3)

    def sampled():
        torch.manual_seed(1)
        return sampler.sample(contexts, sampling)

    used: list = []
    product = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *a: used.append(a) or product(*a))
    first, fast = sampled(), len(used)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    second = sampled()
    used.clear()
    monkeypatch.setattr("opsd.rollout.decoding.PACKING_PAYS", 1000)
    monkeypatch.setattr("opsd.rollout.decoding._make_room", lambda *_: None)
    assert sampled() == second != first
    assert (fast < len(used) / 2) == bool(packed._kernels())


@pytest.mark.parametrize("contexts, packs", [(1, False), (3, False), (16, True)])
def test_weights_in_fp32_are_packed_for_many_sequences(contexts, packs, monkeypatch):
    """With few a copy costs more than it saves, however many `batch_size` allows."""
    sampler = GenerateSampler(copy_model(tiny_model("llama"), torch.float32), frozenset([4]))
    used: list = []
    product = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *a: used.append(a) or product(*a))
    sampler.sample([[5, 6, 7]] * contexts, Sampling(20, temperature=0, batch_size=32))
    assert (not used) == (packs and bool(packed._kernels()))


def test_continuous_batching_has_packed_weights_too(monkeypatch):
    torch.manual_seed(0)
    model = copy_model(tiny_model("llama"), torch.bfloat16)
    sampler, sampling = ContinuousSampler(model, frozenset([4])), Sampling(20, temperature=0)
    used: list = []
    product = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *a: used.append(a) or product(*a))
    first, fast = sampler.sample([[5, 6, 7], [8, 9]], sampling), len(used)
    used.clear()
    monkeypatch.setattr("opsd.rollout.decoding.PACKING_PAYS", 1000)
    assert sampler.sample([[5, 6, 7], [8, 9]], sampling) == first
    assert (fast < len(used) / 2) == bool(packed._kernels())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "gpt2", "bloom", "gpt_neo"])
def test_attention_of_a_decoded_token_is_ours(family, dtype, monkeypatch):
    """In every layer that calls torch's, with padding and in sliding windows. The logits are the
    same, to rounding. Bloom's has a bias, GPT Neo's has its own form: they run as before."""
    torch.manual_seed(0)
    wide = {"head_dim": 16} if family in ("llama", "gemma3_text") else {"hidden_size": 64}
    model = copy_model(tiny_model(family, **wide), dtype).eval()
    ids, mask = torch.randint(5, 30, (4, 21)), torch.ones(4, 21, dtype=torch.long)
    mask[1, :9] = mask[3, :20] = 0
    attention, ours = kernel._kernel(), []

    def logits(used):
        monkeypatch.setattr(kernel, "_kernel", lambda: used)
        cache, found = DynamicCache(config=model.config), []
        with torch.no_grad(), decodes_fast(model, 1):
            for start, end in ((0, 12), *((i, i + 1) for i in range(12, 21))):
                found.append(
                    model(
                        input_ids=ids[:, start:end],
                        attention_mask=mask[:, :end],
                        position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, start:end],
                        past_key_values=cache,
                    ).logits[:, -1]
                )
        return torch.stack(found).float()[:, mask[:, 12] > 0]

    fast = logits(lambda call: ours.append(call.tokens) or attention(call))
    plain, layers = logits(None), model.config.num_hidden_layers
    assert len(ours) == (0 if family in ("bloom", "gpt_neo") else 9 * layers)
    apart = (fast - plain).abs().max() / plain.abs().max()
    assert apart < (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bloom", "mpt", "gpt_neo", "jamba"])
def test_equal_contexts_are_read_once(family):
    """Where the cache can be copied; they write what each alone would."""
    model = tiny_model(family).eval()
    contexts = [torch.randint(5, 30, (length,)).tolist() for length in (17, 3, 9)]
    sampler, sampling = GenerateSampler(model, frozenset([4])), Sampling(40, temperature=0)
    alone = [sampler.sample([context], sampling)[0] for context in contexts]
    rows = []
    hook = model.get_input_embeddings().register_forward_hook(lambda m, i, o: rows.append(len(o)))
    several = sampler.sample(contexts * 3, sampling)
    hook.remove()
    assert several == alone * 3
    read, *decoded = [count for count in rows if count > 1]  # 1: whether padding is read
    assert read == (9 if family == "jamba" else 3) and set(decoded) == {9}
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("family", "together"),
    [("llama", 70), ("gemma3_text", 15), ("bloom", 70), ("mpt", 70), ("phi3", 70), ("jamba", 0)],
)
def test_what_all_contexts_begin_with_is_read_once(family, together, monkeypatch):
    """Where the cache can be copied, as far as its shortest window goes. They write what each alone
    would, with padding longer and shorter than the beginning; the forward that reads the beginning
    must save tokens enough to pay."""
    model = tiny_model(family, **({"sliding_window": 16} if family == "gemma3_text" else {})).eval()
    before = torch.randint(5, 30, (70,)).tolist()
    contexts = [before + torch.randint(5, 30, (n,)).tolist() for n in (0, 5, 90, 3, 3)]
    contexts[0], contexts[1][70] = [*before, 5], 6
    sampler, sampling = GenerateSampler(model, frozenset([4])), Sampling(40, temperature=0)
    alone = [sampler.sample([context], sampling)[0] for context in contexts]
    read = []
    sampler._reads_padding()
    hook = model.get_input_embeddings().register_forward_hook(
        lambda m, i, o: read.append(o.shape[:2])
    )
    for least in (60, 10_000):
        monkeypatch.setitem(read_once.SAVED, "cpu", least)
        read.clear()
        assert sampler.sample(contexts * 2, sampling) == alone * 2
        start = together if least == 60 else 0
        distinct = 10 if family == "jamba" else 5
        assert read[: bool(start) + 1] == [(1, start)] * bool(start) + [(distinct, 160 - start)]
    hook.remove()
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_model_that_adds_tokens_of_its_own_reads_each_context(monkeypatch):
    model = tiny_model("cpmant").eval()
    contexts = [[7, 8, 9, 10, n, *range(5, 5 + n)] for n in (11, 13)]
    sampler, sampling = GenerateSampler(model, frozenset([4])), Sampling(5, temperature=0)
    alone = [sampler.sample([context], sampling)[0] for context in contexts]
    monkeypatch.setitem(read_once.SAVED, "cpu", 1)
    assert sampler.sample(contexts, sampling) == alone
