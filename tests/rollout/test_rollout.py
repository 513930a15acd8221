"""The samplers: order, stops, lengths, and that both write the same greedy tokens."""

import resource

import pytest
import torch
from helpers.tiny_models import tiny_model
from helpers.training_cases import ROWS

from opsd.common.errors import UserError
from opsd.config.sections import PromptsSection
from opsd.data.prompts import Prompts
from opsd.models.copies import contiguous_head, copy_model, update_copy
from opsd.models.load import stop_ids
from opsd.quickstart import tiny_model as tiny
from opsd.rollout import SAMPLERS, ContinuousSampler, GenerateSampler, Rollout, Sampling
from opsd.rollout.base import cut


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny.make_model(3, tokenizer).eval()


@pytest.fixture(scope="module")
def contexts(tokenizer):
    section = PromptsSection(student=tiny.STUDENT_PROMPT, teacher=tiny.TEACHER_PROMPT)
    prompts = Prompts(section, tokenizer)
    made = [prompts.context(row) for row in ROWS[:5]]
    # Of different lengths, and not in their order.
    return [ids for context in made for ids in (context.student, context.teacher)]


def greedy_by_hand(model, context, stops, length):
    """One token at a time, the whole sequence anew, no cache, no padding."""
    ids = list(context)
    for _ in range(length):
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(scores.argmax()))
        if ids[-1] in stops:
            break
    return ids[len(context) :]


def test_cut_keeps_the_stop_and_drops_the_rest():
    assert cut([5, 6, 2, 7, 2], frozenset([2])) == Rollout([5, 6, 2], True)
    assert cut([5, 9, 2], frozenset([2, 9])) == Rollout([5, 9], True)
    assert cut([2, 5], frozenset([2])) == Rollout([2], True)
    assert cut([5, 6], frozenset([2])) == Rollout([5, 6], False)
    assert cut([], frozenset([2])) == Rollout([], False)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_generate_is_greedy_decoding(batch_size, model, tokenizer, contexts):
    stops = stop_ids(model, tokenizer)
    sampling = Sampling(12, temperature=0, batch_size=batch_size)
    rollouts = GenerateSampler(model, stops).sample(contexts, sampling)
    assert [r.ids for r in rollouts] == [greedy_by_hand(model, c, stops, 12) for c in contexts]


FAMILIES = ["llama", "gemma3_text", "bloom", "mpt", "gpt_neo", "mamba", "jamba", "lfm2"]


@pytest.mark.parametrize("family", [*FAMILIES, "rwkv", "recurrent_gemma"])
def test_no_padding_is_read(family):
    """RWKV and RecurrentGemma take no mask: in a padded batch they read the padding."""
    torch.manual_seed(0)
    model = tiny_model(family).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.5 if weight.dim() > 1 else 0)
    contexts = [torch.randint(5, 30, (length,)).tolist() for length in (17, 3, 9, 3)]
    sampler, stops = GenerateSampler(model, frozenset([4])), frozenset([4])
    sampled = sampler.sample(contexts, Sampling(6, temperature=0, batch_size=3))
    assert [r.ids for r in sampled] == [greedy_by_hand(model, c, stops, 6) for c in contexts]


def test_both_samplers_write_the_same_greedy_tokens(model, tokenizer, contexts):
    sampling, stops = Sampling(12, temperature=0), stop_ids(model, tokenizer)
    generate = GenerateSampler(model, stops).sample(contexts, sampling)
    continuous = ContinuousSampler(model, stops).sample(contexts, sampling)
    assert continuous == generate
    assert any(rollout.finished for rollout in generate)
    assert len({len(rollout.ids) for rollout in generate}) > 1


def test_nothing_is_drawn_of_logits_that_are_no_numbers(model, tokenizer, contexts):
    damaged, stops = copy_model(model, torch.float32, "cpu"), stop_ids(model, tokenizer)
    for number, temperature in ((torch.nan, 1.0), (torch.inf, 0.0)):
        damaged.get_input_embeddings().weight.data[contexts[1][0]] = number
        with pytest.raises(UserError, match="the model's logits are not finite"):
            GenerateSampler(damaged, stops).sample(contexts, Sampling(2, temperature=temperature))


@pytest.mark.parametrize("engine", sorted(SAMPLERS))
def test_a_sampler_leaves_the_model_as_it_was(engine, tokenizer, contexts):
    model = tiny.make_model(3, tokenizer).train()
    attention = model.config._attn_implementation
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []
    SAMPLERS[engine](model, stop_ids(model, tokenizer)).sample(
        contexts,
        Sampling(4, temperature=0),
        lambda sequences, tokens: seen.append((sequences, tokens)),
    )
    assert model.training and model.config._attn_implementation == attention
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert sum(sequences for sequences, _ in seen) == len(contexts)
    assert 0 < sum(tokens for _, tokens in seen) <= 4 * len(contexts)


@pytest.mark.parametrize("engine", sorted(SAMPLERS))
def test_sampled_rollouts_end_with_their_stop_or_at_the_limit(engine, model, tokenizer, contexts):
    stops = stop_ids(model, tokenizer) | {7, 11}
    torch.manual_seed(0)
    sampling = Sampling(16, temperature=1.5, batch_size=4)
    rollouts = SAMPLERS[engine](model, stops).sample(contexts * 4, sampling)
    assert {rollout.finished for rollout in rollouts} == {True, False}
    for rollout in rollouts:
        assert not stops & set(rollout.ids[:-1])
        assert (rollout.ids[-1] in stops) == rollout.finished
        assert rollout.finished or len(rollout.ids) == 16
    assert len({tuple(rollout.ids) for rollout in rollouts[:: len(contexts)]}) > 1


def test_sampling_follows_the_models_distribution(model, tokenizer, contexts):
    """The first token's frequencies against the softmax, at a temperature and cut to the top 3."""
    context, n = contexts[0], 2000
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([context])).logits[0, -1]
    sampler = GenerateSampler(model, stop_ids(model, tokenizer))
    for temperature, top_k in ((2.0, 0), (2.0, 3)):
        torch.manual_seed(0)
        sampling = Sampling(1, temperature=temperature, top_k=top_k, batch_size=n)
        drawn = sampler.sample([context] * n, sampling)
        counts = torch.bincount(torch.tensor([r.ids[0] for r in drawn]), minlength=len(scores))
        wanted = scores / temperature
        if top_k:
            wanted = wanted.masked_fill(wanted < wanted.topk(top_k).values[-1], -torch.inf)
        wanted = wanted.softmax(-1)
        assert (counts / n - wanted).abs().max() < 4 * 0.5 / n**0.5
        assert not counts[wanted == 0].any()


def test_continuous_batching_takes_no_more_memory_than_it_needs(model, tokenizer, contexts):
    """Left to itself it fills the machine's free memory with its cache: 14 GB for this model."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sampler = ContinuousSampler(model, stop_ids(model, tokenizer))
    rollouts = sampler.sample(contexts, Sampling(4, temperature=0))
    assert len(rollouts) == len(contexts)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB on Linux
    assert grown < 500_000


def test_a_continuous_engine_that_dies_is_an_error(tokenizer, contexts):
    """It returns what there was until then as if it were whole."""
    model, count = tiny.make_model(0, tokenizer), [0]

    def fail(*_):
        count[0] += 1
        if count[0] == 3:
            raise RuntimeError("the worker is gone")

    model.model.register_forward_pre_hook(fail)
    sampler = ContinuousSampler(model, frozenset([tokenizer.eos_token_id]))
    with pytest.raises(UserError, match=r"rollout\.engine is 'continuous': .*worker is gone"):
        sampler.sample(contexts, Sampling(8, temperature=0))


def test_stop_ids_are_the_tokenizers_and_the_generation_configs(tokenizer):
    model = tiny.make_model(0, tokenizer)
    end = tokenizer.eos_token_id
    for extra, wanted in ((None, {end}), (3, {end, 3}), ([3, 4], {end, 3, 4})):
        model.generation_config.eos_token_id = extra
        assert stop_ids(model, tokenizer) == wanted


def test_a_copy_follows_only_when_told(tokenizer):
    model = tiny.make_model(0, tokenizer)
    inference_copy = copy_model(model, torch.bfloat16)
    assert inference_copy.dtype == torch.bfloat16 and not any(
        p.requires_grad for p in inference_copy.parameters()
    )
    assert (
        inference_copy.get_output_embeddings().weight
        is inference_copy.get_input_embeddings().weight
    )
    before = inference_copy.model.norm.weight.clone()
    with torch.no_grad():
        model.model.norm.weight += 1
    assert torch.equal(inference_copy.model.norm.weight, before)
    update_copy(inference_copy, model)
    assert torch.equal(inference_copy.model.norm.weight, model.model.norm.weight.bfloat16())


def test_a_contiguous_head_gives_the_same_logits(tokenizer, contexts):
    model = tiny.make_model(0, tokenizer).eval()
    ids = torch.tensor([contexts[0]])
    with torch.no_grad():
        plain = model(input_ids=ids, logits_to_keep=1).logits
        assert torch.equal(contiguous_head(model)(input_ids=ids, logits_to_keep=1).logits, plain)
