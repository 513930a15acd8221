"""Contexts whose rollouts fill several micro-batches: run once, with the gradients of one batch."""

import pytest
import torch
import yaml
from helpers.prefix_models import MODELS, alone, ids, make
from helpers.step_cases import make_sample_groups, make_step
from helpers.training_cases import short_values, write_model, write_rows
from transformers import GPT2Config, GPT2LMHeadModel

from opsd.cli.main import main
from opsd.config.load import merge
from opsd.objectives import Sample, SampleGroup, Totals
from opsd.prefix import (
    PrefixCache,
    cached_token_cost,
    shared_prefix_hidden_states,
    unpackable,
)
from opsd.training.micro_batches import cache_prefixes, packed_batches

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


def loss_of(states, seed):
    draw = torch.Generator().manual_seed(seed)
    return (states * torch.randn(states.shape, generator=draw)).sum()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def pieces():
    """A prefix and six rollouts in three micro-batches; the last has another group, too."""
    first, other = ids(30, 9)
    rollouts, others = ids(5, 1, 9, 3, 12, 4, seed=2), ids(3, 8, seed=3)
    batches = [rollouts[:2], rollouts[2:3], rollouts[3:]]
    return [[(first, batch)] for batch in batches[:2]] + [[(first, batches[2]), (other, others)]]


def cached(batches, trains):
    """The batches with their first prefix, which all have, cached; and the cache."""
    cache = PrefixCache()
    prefix = cache.add(batches[0][0][0].tolist(), trains, len(batches) - 1)
    return [[(prefix, batch[0][1]), *batch[1:]] for batch in batches], cache


def counted(model):
    """The lengths of the streams that run through the model from now on."""
    lengths = []
    assert unpackable(model) is None  # which runs two tokens the first time
    model.get_decoder().register_forward_pre_hook(
        lambda module, inputs, arguments: lengths.append(arguments["input_ids"].shape[1]),
        with_kwargs=True,
    )
    return lengths


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["qwen3", "mistral, window", "gemma 3", "mixtral"])
def test_a_cached_prefix_gives_the_gradients_of_one_piece(name, checkpointing):
    model = make(*MODELS[name]).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = pieces()
    first, (other, others) = batches[0][0][0], batches[2][1]
    whole = [(first, [r for batch in batches for r in batch[0][1]]), (other, others)]
    states = shared_prefix_hidden_states(model, whole)
    sizes = [sum(len(r) for _, rollouts in batch for r in rollouts) for batch in batches]
    sum(loss_of(x, n) for n, x in enumerate(states.split(sizes))).backward()
    wanted = gradients(model)

    model.zero_grad()
    lengths = counted(model)
    found, (batches, cache) = [], cached(batches, trains=True)
    for number, batch in enumerate(batches):
        found.append(shared_prefix_hidden_states(model, batch))
        loss_of(found[-1], number).backward()
        cache.batch_done()
    assert (torch.cat(found) - states).abs().max() < 2e-5
    # The prefix once, and then its last token with each batch's rollouts.
    assert lengths == [29, 1 + 4, 1 + 8, 1 + 2 + 11 + 3 + 9 + 2 + 7]
    for key, g in gradients(model).items():
        assert (g - wanted[key]).norm() <= 1e-5 * wanted[key].norm(), key
    assert gradients(model).keys() == wanted.keys()


def test_without_gradients_the_keys_are_cached_as_well():
    model = make("Qwen3")
    batches = pieces()
    lengths = counted(model)
    with torch.no_grad():
        found = [shared_prefix_hidden_states(model, batch) for batch in cached(batches, False)[0]]
        assert lengths == [29, 5, 9, 35]
        for batch, states in zip(batches, found, strict=True):
            assert (states - alone(model, batch)).abs().max() < 2e-5


def test_what_may_not_train_from_a_cached_prefix_runs_again():
    model = make("Qwen3")
    batches, cache = cached(pieces(), trains=False)
    lengths = counted(model)
    for batch in batches:
        shared_prefix_hidden_states(model, batch).sum().backward()
        cache.batch_done()
    assert lengths == [30 + 4, 30 + 8, 30 + 2 + 11 + 3 + 9 + 2 + 7]


def test_nothing_is_held_after_the_last_batch():
    model = make("Qwen3")
    batches, cache = cached(pieces(), trains=True)
    for number, batch in enumerate(batches):
        shared_prefix_hidden_states(model, batch).sum().backward()
        cache.batch_done()
        assert bool(cache.prefixes[0]._runs) == (number < len(batches) - 1)


def test_reentrant_checkpoints_are_refused():
    model = make("Qwen3").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant=True"):
        shared_prefix_hidden_states(model, cached(pieces(), trains=True)[0][0])


def one_step(budget, live=False, trains=True):
    """A step's gradient, the tokens that ran through the student in it, and its cached prefixes."""
    step = make_step()
    step.cache_trains = trains
    if live:
        step.objective.teacher = step.model
    tokens = counted(step.model)
    batches, cache = step.cache_prefixes(step.micro_batches(make_sample_groups(), budget), budget)
    for batch in batches:
        step(batch, Totals()).backward()
        cache.batch_done()
    gradient = torch.cat([p.grad.flatten() for p in step.parameters()])
    return gradient, sum(tokens), [prefix.trains for prefix in cache.prefixes]


@pytest.mark.parametrize("live", [False, True])
def test_a_step_of_split_groups_is_the_step_of_whole_ones(live):
    wanted, _, _ = one_step(1000, live)
    found, tokens, trains = one_step(28, live)
    assert any(trains)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    again, more, trains = one_step(28, live, trains=False)
    assert trains and not any(trains) and more > tokens
    assert (again - wanted).norm() < 1e-5 * wanted.norm()


def of_lengths(context, *rollouts):
    return SampleGroup([1] * context, [Sample([2] * n, 1.0) for n in rollouts])


def sizes(batches):
    return [sum(len(group.samples) for group in batch) for batch in batches]


def test_what_is_cached_counts_against_the_budget():
    groups = [of_lengths(100, 50, 50, 50, 50)]
    assert sizes(packed_batches(groups, 250, None)) == [3, 1]
    assert sizes(packed_batches(groups, 250, 0.5)) == [2, 2]
    # No room for a cache: the context runs again in each, and is not counted.
    assert sizes(packed_batches(groups, 250, 1.5)) == [3, 1]


def test_split_groups_follow_each_other_and_are_filled_up():
    groups = [of_lengths(20, 30, 30, 30), of_lengths(10, 5), of_lengths(9, 60)]
    batches = packed_batches(groups, 80, None)
    found = [[(len(g.student), len(g.samples)) for g in batch] for batch in batches]
    assert found == [[(20, 2)], [(20, 1), (10, 1)], [(9, 1)]]


def test_a_prefix_of_one_token_is_not_cached():
    for length, cached in ((1, 0), (2, 1)):
        batches = packed_batches([of_lengths(length, 30, 30, 30)], 40, 0.0)
        assert len(batches) == 3 and len(cache_prefixes(batches, 40, 0.0)[1].prefixes) == cached


def test_what_a_cached_token_costs_where_the_feed_forward_width_has_no_name():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=16))
    assert cached_token_cost(model) == 2 * 32 / (8 * 32 + 4 * 128)


def test_what_a_cached_token_costs():
    model = make("Llama", {"num_key_value_heads": 4})  # keys as wide as the hidden states
    assert cached_token_cost(model) == 2 * 32 / (8 * 32 + 4 * 48)
    for heads, wanted in ((4, 4), (2, 2)):
        model = make("Llama", {"num_key_value_heads": heads})
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert cached_token_cost(model) == wanted


@pytest.mark.parametrize(("tokens", "said"), [(60, "is kept"), (8, "runs again"), (9999, None)])
def test_a_run_says_what_becomes_of_a_context_that_is_split(tokens, said, tmp_path, capsys):
    values = short_values(
        write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    )
    values = merge(values, {"train": {"steps": 2, "save_every": 0}, "eval": {"problems": 0}})
    values = merge(values, {"rollout": {"group_size": 6}})
    values = merge(values, {"train": {"micro_batch_tokens": tokens}})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["train", str(path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert ("fill several micro-batches" in out) == (said is not None)
    assert said is None or said in out
