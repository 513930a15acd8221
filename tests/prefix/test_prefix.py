"""Shared prefixes: the same hidden states and gradients as each rollout by itself, everywhere."""

import re
import warnings

import pytest
import torch
import transformers
from helpers.prefix_models import (
    MODELS,
    VOCABULARY,
    alone,
    assert_same,
    gemma_4,
    ids,
    make,
    make_groups,
)
from helpers.tiny_models import tiny_model
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from opsd.prefix import (
    cached_token_cost,
    hidden_states,
    layout,
    prefix_cache,
    shared_prefix_hidden_states,
    states_by_role,
    uncontinuable,
    unpackable,
)
from opsd.prefix import tiled as tiling

# transformers 5.24 renames gradient_checkpointing_enable; 5.0 has only this name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

NOT_PACKABLE = {
    "mamba 2": ("Mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}, "layer"),
    "qwen3-next": ("Qwen3Next", {"num_hidden_layers": 4}, "layer 0"),
    "lfm2": ("Lfm2", {"layer_types": ["full_attention", "conv"]}, "layer 1"),
    "bloom": ("Bloom", {}, "BloomModel"),
    "dropout": ("Llama", {"attention_dropout": 0.1}, "at random"),
    "dropout by another name": ("OPT", {"attention_dropout": 0.1}, "at random"),
    "doge": ("Doge", {}, "DogeAttention hands attention_mask"),
    "phi-moe": (
        "Phimoe",
        {"sliding_window": 7, "num_local_experts": 4, "num_experts_per_tok": 2},
        "layers.0.self_attn of PhimoeModel leaves its sliding window to a mask",
    ),
}


@pytest.mark.parametrize("checkpointing", [None, "plain", "reentrant"])
@pytest.mark.parametrize("name", MODELS)
def test_sharing_changes_neither_states_nor_gradients(name, checkpointing):
    model = make(*MODELS[name]).train()
    assert unpackable(model) is None
    if checkpointing:
        reentrant = checkpointing == "reentrant"
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
    groups = make_groups()
    before = model.config._attn_implementation
    shared = shared_prefix_hidden_states(model, groups)
    assert model.config._attn_implementation == before
    assert_same(model, shared, groups)


@pytest.mark.parametrize("name", ["qwen3", "mistral, window", "gemma 2, soft caps"])
def test_many_tiles_give_the_same(name, monkeypatch):
    """Long segments are cut; here into pieces of 16 queries, and no two segments in a tile."""
    monkeypatch.setattr(tiling, "TILE_SCORES", 4)
    monkeypatch.setattr(tiling, "TILE_COST", 0)
    model = make(*MODELS[name])
    groups = [(ids(40)[0], ids(50, 33, seed=2)), (ids(2)[0], ids(20, seed=3))]
    assert_same(model, shared_prefix_hidden_states(model, groups), groups)


def as_teacher(groups, common):
    """The same rollouts after other contexts, whose first tokens are the same."""
    draw = torch.Generator().manual_seed(7)
    return [
        (torch.cat([prefix[:c], torch.randint(3, VOCABULARY, (13,), generator=draw)]), rollouts)
        for (prefix, rollouts), c in zip(groups, common, strict=True)
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["qwen3", "mistral, window", "gemma 3", "deepseek, latent"])
def test_a_live_teacher_reads_the_students_start(name, checkpointing):
    model = make(*MODELS[name]).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    groups = make_groups()
    # All of the student's prefix, nothing, a part, and more than the window.
    common = (11, 0, 3, 25)
    others = as_teacher(groups, common)
    assert unpackable(model) is None  # which runs two tokens the first time
    tokens = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, inputs, arguments: tokens.append(arguments["input_ids"].shape[1]),
        with_kwargs=True,
    )
    student, teacher = states_by_role(model, [groups, others])
    whole = [len(layout.Layout(g, torch.device("cpu")).ids) for g in (groups, others)]
    assert tokens == [whole[0], whole[1] - sum(common)]
    with torch.no_grad():
        assert (teacher - alone(model, others)).abs().max() < 2e-5
    assert not teacher.requires_grad
    assert_same(model, student, groups)


@pytest.mark.parametrize("teacher", ["the student's groups", "a common start", "nothing in common"])
def test_split_weights_run_a_role_in_one_forward(teacher, monkeypatch):
    """All processes gather the weights of a forward together, so none may have more or fewer."""
    monkeypatch.setattr(hidden_states, "CHUNK", 8)
    monkeypatch.setattr(prefix_cache, "CHUNK", 8)
    model, groups = make("Qwen3").train(), make_groups()
    assert unpackable(model) is None
    others = {"a": as_teacher(groups, (11, 0, 3, 25)), "n": as_teacher(groups, [0] * 4)}
    others = others.get(teacher[0], groups)
    next(model.parameters()).ds_id = 0  # as ZeRO 3 marks weights
    forwards = []
    model.get_decoder().register_forward_pre_hook(lambda *_: forwards.append(1))
    student, its = states_by_role(model, [groups, others])
    assert len(forwards) == 2
    assert (its - alone(model, others)).abs().max() < 2e-5
    assert_same(model, student, groups)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_autocast_for_several_batches_loses_no_gradient(checkpointing):
    """It keeps what it has cast: without a graph, if the teacher's pass had been the first."""
    model = make("Qwen3").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    groups = make_groups()
    gradients = []
    for once in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=once):
            for part in (groups[:2], groups[2:]):
                with torch.autocast("cpu", torch.bfloat16):
                    states, _ = states_by_role(model, [part, as_teacher(part, (1, 0))])
                with torch.autocast("cpu", enabled=False):
                    states.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.model.parameters()]))
    assert gradients[1].norm() > 0
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


def test_tiles_hold_every_query_once_and_only_what_it_sees():
    groups = make_groups()
    packed = layout.Layout(groups, torch.device("cpu"))
    for window in (None, 4):
        for tile in tiling.tiles(packed, 2, window):
            first, mask = tile.mask(torch.float32)
            seen = torch.nn.functional.pad(mask[:, 0, 0] == 0, (first, 0), value=True)
            rows = tile.key_rows.view(len(tile.pieces), -1)
            for piece, visible, keys in zip(tile.pieces, seen, rows, strict=True):
                for i in range(piece.queries.length):
                    position = piece.queries.position + i
                    oldest = 0 if window is None else max(0, position - window + 1)
                    found = packed.positions[keys[visible[i]]].tolist()
                    assert found == list(range(oldest, position + 1))
        queries = [
            s for tile in tiling.tiles(packed, 2, window) for s in (p.queries for p in tile.pieces)
        ]
        rows = sorted(row for s in queries for row in range(s.start, s.start + s.length))
        assert rows == list(range(len(packed.ids)))


def test_each_prefix_is_run_once_and_no_last_token():
    groups = make_groups()
    tokens = len(layout.Layout(groups, torch.device("cpu")).ids)
    assert tokens == sum(len(p) + sum(len(r) - 1 for r in rollouts) for p, rollouts in groups)


@pytest.mark.parametrize("name", NOT_PACKABLE)
def test_layers_that_cannot_be_packed_are_named_and_continue_their_prefix(name):
    kind, sizes, named = NOT_PACKABLE[name]
    model, groups = make(kind, sizes), make_groups()
    assert re.search(named, unpackable(model)) and uncontinuable(model, trains=True) is None
    assert_same(model, shared_prefix_hidden_states(model, groups), groups)


ROPE = {"rope_theta": 100.0, "factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
SCALED = {
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", **ROPE}},
    "longrope": {"rope_parameters": {**LONG, **ROPE, "original_max_position_embeddings": 32}},
}


@pytest.mark.parametrize("scaled", SCALED)
@pytest.mark.parametrize("trains", [False, True])
def test_positions_that_the_longest_scales_are_named_once_and_run_unshared(scaled, trains):
    """A prefix alone may be short of the length from which they are scaled (Phi 3 and 4)."""
    model = make("Llama", SCALED[scaled])
    hidden_states._warn_once.cache_clear()
    groups = [(ids(28)[0], ids(9, 7, seed=3)), (ids(30)[0], ids(5, seed=4))]
    with torch.set_grad_enabled(trains):
        with pytest.warns(UserWarning, match=rf"scales its positions \({scaled}\)"):
            shared = shared_prefix_hidden_states(model, groups)
        assert (shared - alone(model, groups)).abs().max() < 2e-5
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            shared_prefix_hidden_states(model, groups)


def test_autocast_stays_near_fp32():
    model = make("Qwen3")
    groups = make_groups()
    wanted = shared_prefix_hidden_states(model, groups)
    with torch.autocast("cpu", torch.bfloat16):
        found = shared_prefix_hidden_states(model, groups)
    assert 1e-5 < (found - wanted).abs().max() < 0.1


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "groups is empty"),
        ([([], [[1]])], r"groups\[0\] has an empty prefix"),
        ([([1], [[1]]), ([1], [])], r"groups\[1\] has rollouts of lengths \[\]"),
        ([([1], [[1], []])], r"lengths \[1, 0\]"),
        ([(torch.ones(2), [[1]])], "dtype torch.float32"),
        ([(torch.ones(2, 2, dtype=torch.long), [[1]])], r"shape \(2, 2\)"),
        (
            [([1], [[1]]), ([1] * 120, [[1], [1] * 10])],
            r"groups\[1\] .* 120 .* 10: .* 128 positions",
        ),
        ([([1], [[1, 61]])], r"groups\[0\] holds ids from 1 to 61: .* of 0 to 60"),
        ([([1], [[-1]])], r"ids from -1 to -1"),
    ],
)
def test_what_is_not_a_group_is_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        shared_prefix_hidden_states(make("Qwen3"), groups)


def test_the_last_position_is_used():
    model = make("Qwen3")
    groups = [([1] * 119, [[1] * 10])]
    assert shared_prefix_hidden_states(model, groups).shape == (10, 32)


def test_attention_that_the_user_set_is_not_replaced():
    calls = []

    def mine(module, query, key, value, mask, **more):
        calls.append(query.shape[2])
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **more)

    AttentionInterface.register("mine", mine)
    model = make("Qwen3")
    assert unpackable(model) is None
    model.set_attn_implementation("mine")
    groups = make_groups()[:1]
    # Without the mask that transformers makes for the attention it knows, it cannot continue.
    assert "its states differ" in uncontinuable(model, trains=True)
    hidden_states._warn_once.cache_clear()
    calls.clear()
    with pytest.warns(UserWarning, match="attends by 'mine', which is not replaced"):
        found = shared_prefix_hidden_states(model, groups)
    assert calls == [11 + 8] * 2  # a layer each: the longest of three padded rows
    assert (found - alone(model, groups)).abs().max() < 2e-5


def test_a_name_that_only_sounds_recurrent_shares():
    """SeedOssMLP has "ssm" in its name in small letters."""
    model = make("SeedOss", {"head_dim": 8, "residual_dropout": 0.0, "attention_dropout": 0.0})
    assert unpackable(model) is None
    groups = make_groups()
    assert_same(model, shared_prefix_hidden_states(model, groups), groups)


def test_layers_whose_heads_differ_share():
    """Gemma 4's full layers have wider heads than those with a window."""
    torch.manual_seed(0)
    config = gemma_4(["sliding_attention", "full_attention", "full_attention"])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert cached_token_cost(model) > 0
    groups = make_groups()
    assert_same(model, shared_prefix_hidden_states(model, groups), groups)


@pytest.mark.parametrize("model_type", ["gpt_oss", "mimo_v2_flash"])
def test_attention_sinks_join_the_softmax(model_type):
    """All layers have them, and those with a window alone."""
    model = tiny_model(model_type).train()
    sinks = [p for name, p in model.named_parameters() if name.endswith("sinks")]
    for parameter in sinks:
        torch.nn.init.normal_(parameter)
    assert unpackable(model) is None
    groups = make_groups()
    assert_same(model, shared_prefix_hidden_states(model, groups), groups)
    assert all(parameter.grad.abs().sum() > 0 for parameter in sinks)


@pytest.mark.parametrize("kind", ["Bart", "Pegasus", "Blenderbot"])
def test_models_without_positions_are_not_packed(kind):
    """Their decoders count positions themselves, so that a stream would be one long sequence."""
    sizes = {"d_model": 32, "decoder_layers": 1, "encoder_layers": 1, "decoder_ffn_dim": 48}
    heads = {"decoder_attention_heads": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCABULARY, **sizes, **heads)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    assert "takes no positions" in unpackable(model)
