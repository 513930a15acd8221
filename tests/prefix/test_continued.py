"""Prefixes shared by what they leave: the states of each rollout alone, and who can do it."""

import peft
import pytest
import torch
from helpers.prefix_models import alone, assert_same, make_groups
from helpers.tiny_models import tiny_model

from opsd.models.head import decoder_of, keeping_router_logits
from opsd.prefix import (
    PrefixCache,
    continued,
    hidden_states,
    prefix_cache,
    rollout_hidden_states,
    shared_prefix_hidden_states,
    uncontinuable,
    unpackable,
)

HYBRIDS = """qwen3_5_text qwen3_next granitemoehybrid nemotron_h falcon_h1 lfm2_moe minimax
    olmo_hybrid zamba2 mamba2 rwkv""".split()


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_rollouts_continue_what_a_prefix_left(model_type, monkeypatch):
    model, groups = tiny_model(model_type).train(), make_groups()
    assert unpackable(model) is not None and uncontinuable(model) is None
    calls = []
    decoder = decoder_of(model)
    decoder.register_forward_pre_hook(lambda _, inputs: calls.append(1))
    with torch.no_grad():
        wanted = alone(model.eval(), groups)
        for chunk, forwards in ((4096, 7), (7, 12)):  # one rollout is a target alone
            monkeypatch.setattr(continued, "CHUNK", chunk)
            calls.clear()
            found = shared_prefix_hidden_states(model.train(), groups)
            assert len(calls) == forwards
            assert (found - wanted).abs().max() < 2e-5
    assert model.training


@pytest.mark.parametrize("model_type", sorted({*HYBRIDS} - {"rwkv"}))
def test_gradients_flow_through_what_a_prefix_left(model_type):
    """In two passes: the trial, and then the first, may leave nothing behind."""
    model, groups = tiny_model(model_type).train(), make_groups()
    assert uncontinuable(model, trains=True) is None
    calls = []
    hook = decoder_of(model).register_forward_pre_hook(lambda _, inputs: calls.append(1))
    shared_prefix_hidden_states(model, groups)
    assert len(calls) == 7
    hook.remove()
    assert_same(model, shared_prefix_hidden_states(model, groups), groups)


def test_adapters_get_the_same_gradients():
    """The base is frozen, and so are its embeddings, by which the trial judges."""
    model, groups = tiny_model("qwen3_5_text"), make_groups()
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():  # peft's own would be ten times the base
            parameter.mul_(0.1 if parameter.requires_grad else 1.0)
    assert uncontinuable(adapted, trains=True) is None
    assert_same(model, shared_prefix_hidden_states(adapted, groups), groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_gradients_are_judged_by_their_own_size(dtype):
    """Those of small embeddings are large, as in real models."""
    model = tiny_model("qwen3_5_text").to(dtype)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1e-3)
    assert uncontinuable(model, trains=True) is None


def test_a_cache_that_loses_gradients_is_found(monkeypatch):
    model, copies = tiny_model("qwen3_5_text"), continued._copies

    def detached(*given):
        copied = copies(*given)
        for layer in copied.layers:
            for number, state in getattr(layer, "recurrent_states", {}).items():
                layer.recurrent_states[number] = state.detach()
        return copied

    monkeypatch.setattr(continued, "_copies", detached)
    assert uncontinuable(model) is None
    assert "continues it with other gradients" in uncontinuable(model, trains=True)


@pytest.mark.parametrize("why", ["checkpointed", "split", "routers", "in place"])
def test_who_trains_in_whole_rows(why):
    """Checkpointed layers drop the cache; split weights need equally many forwards everywhere; the
    routers' loss counts each token once; RWKV writes over a state that backward reads."""
    model = tiny_model("rwkv" if why == "in place" else "lfm2_moe").train()
    if why == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if why == "split":
        next(model.parameters()).ds_id = 0
    with keeping_router_logits(why == "routers"):
        assert uncontinuable(model, trains=True) is not None
        assert uncontinuable(model) is None  # the teacher's
        states = rollout_hidden_states(model, make_groups()[:1])
    assert (states - alone(model, make_groups()[:1])).abs().max() < 2e-5
    if why == "checkpointed":
        assert uncontinuable(model.eval(), trains=True) is None


def test_a_checkpointed_model_keeps_its_cache():
    model, groups = tiny_model("qwen3_5_text").train(), make_groups()[:1]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.no_grad():
        found = rollout_hidden_states(model, groups)
        assert (found - alone(model.eval(), groups)).abs().max() < 2e-5
    assert uncontinuable(model) is None


def test_micro_batches_continue_one_run():
    model, (*_, (prefix, rollouts)) = tiny_model("qwen3_5_text"), make_groups()
    assert uncontinuable(model) is None  # which runs some tokens the first time
    calls = []
    model.model.register_forward_pre_hook(lambda _, inputs: calls.append(1))
    cache = PrefixCache()
    cached = cache.add(prefix.tolist(), trains=False, last_batch=1)
    with torch.no_grad():
        parts = [
            rollout_hidden_states(model, [(cached, rollouts[a:b])]) for a, b in ((0, 5), (5, 8))
        ]
        assert len(calls) == 3
        found, wanted = torch.cat(parts), alone(model, [(prefix, rollouts)])
    assert (found - wanted).abs().max() < 2e-5
    for _ in range(2):
        cache.batch_done()
    assert not cached._continuations


@pytest.mark.parametrize("model_type", ["mamba", "jamba"])
def test_layers_that_forget_their_state_are_found(model_type):
    """Their scan takes a first state for single tokens only."""
    model = tiny_model(model_type)
    assert "does not continue it exactly" in uncontinuable(model)
    groups = make_groups()[:2]
    with torch.no_grad(), pytest.warns(UserWarning, match="not shared"):
        hidden_states._warn_once.cache_clear()
        found = shared_prefix_hidden_states(model, groups)
    assert (found - alone(model, groups)).abs().max() < 2e-5


@pytest.mark.parametrize("model_type", ["qwen3", "mistral", "gemma3_text"])
def test_a_long_prefix_of_a_packed_stream_runs_in_chunks(model_type, monkeypatch):
    model, groups = tiny_model(model_type), make_groups()
    assert unpackable(model) is None
    widths = []
    model.model.register_forward_pre_hook(
        lambda _, inputs, more: widths.append(more["input_ids"].shape[1]), with_kwargs=True
    )
    for module in (hidden_states, prefix_cache):
        monkeypatch.setattr(module, "CHUNK", 8)
    with torch.no_grad():
        found = rollout_hidden_states(model, groups)
        assert widths[:-1] == [8, 2, 8, 8, 8, 5]  # of 11 and 30 tokens, all but the last
        assert (found - alone(model, groups)).abs().max() < 2e-5


def test_without_sharing_no_model_is_tried(monkeypatch):
    """A trial runs the model: under fake tensors, as in a plan, it has crashed the process."""
    model, groups = tiny_model("qwen3_5_text").eval(), make_groups()
    tried = "opsd.prefix.hidden_states._alone_because"
    monkeypatch.setattr(tried, lambda model: pytest.fail("tried"))
    with torch.no_grad():
        found = rollout_hidden_states(model, groups, share=False)
        assert torch.allclose(found, alone(model, groups), atol=2e-5)
