"""Tiny models of every supported family, groups of rollouts for them, and forwards without
sharing.
"""

import torch
import transformers
from transformers import GenerationConfig

from opsd.models.head import decoder_of

VOCABULARY = 61


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


MODELS = {
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "llama": ("Llama", {"num_key_value_heads": 1}),
    "llama, scaled positions": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "qwen3, yarn": (
        "Qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral, window": ("Mistral", {"sliding_window": 7, "num_key_value_heads": 4}),
    "gemma 2, soft caps": (
        "Gemma2",
        {"sliding_window": 7, "head_dim": 8, "attn_logit_softcapping": 2.0},
    ),
    "gemma 3": (
        "Gemma3",
        {
            "sliding_window": 7,
            "head_dim": 8,
            "query_pre_attn_scalar": 20,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma 3, soft caps, tied": (
        "Gemma3",
        {
            "sliding_window": 7,
            "head_dim": 8,
            "attn_logit_softcapping": 2.0,
            "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "stablelm": ("StableLm", {"partial_rotary_factor": 0.5}),
    "qwen3, experts": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek, latent": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
            "first_k_dense_replace": 2,
        },
    ),
}


def gemma_4(layer_types: list[str]) -> transformers.PreTrainedConfig:
    """Its full-attention layers have wider heads than those with a window."""
    return transformers.Gemma4TextConfig(
        **{**SIZES, "num_hidden_layers": len(layer_types)},
        head_dim=8,
        global_head_dim=16,
        sliding_window=7,
        layer_types=layer_types,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
    )


GPT_OSS = transformers.GptOssConfig(
    **SIZES,
    head_dim=8,
    num_local_experts=4,
    num_experts_per_tok=2,
    layer_types=["sliding_attention", "full_attention"],
)
"""A model with experts and attention sinks, without sdpa."""


def make(kind, sizes=None):
    torch.manual_seed(0)
    if kind == "Gemma3":
        config = transformers.Gemma3TextConfig(**{**SIZES, **(sizes or {})})
    else:
        config = getattr(transformers, f"{kind}Config")(**{**SIZES, **(sizes or {})})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.generation_config = GenerationConfig()
    # Norms of 1 and biases of 0 would hide errors.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def ids(*lengths, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=draw) for n in lengths]


def make_groups():
    """Groups of 1 to 8 rollouts of different lengths, one of length 1; prefixes of one token, and
    longer than any window.
    """
    return [
        (ids(11)[0], ids(5, 1, 9, seed=2)),
        (ids(1)[0], ids(1, 12, seed=3)),
        (ids(6)[0], ids(1, seed=4)),
        (ids(30)[0], ids(2, 17, 3, 4, 5, 6, 7, 8, seed=5)),
    ]


def alone(model, groups):
    """Run each rollout in its own forward of the plain model, without padding or position ids."""
    states = []
    for prefix, rollouts in groups:
        for rollout in rollouts:
            tokens = torch.cat([prefix, rollout])[None]
            output = decoder_of(model)(input_ids=tokens, use_cache=False)
            states.append(output.last_hidden_state[0, len(prefix) - 1 : -1])
    return torch.cat(states)


def gradient(model, states):
    """The gradient of a function of all states, which also works with reentrant checkpoints."""
    draw = torch.Generator().manual_seed(9)
    model.zero_grad()
    logits = model.get_output_embeddings()(states)
    (logits.log_softmax(-1) * torch.randn(logits.shape, generator=draw)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, shared, groups):
    """Assert that logits are within 2e-5 and gradients within 1e-5 relative, in fp32."""
    found = gradient(model, shared)
    model.gradient_checkpointing_disable()
    separate = alone(model, groups)
    head = model.get_output_embeddings()
    assert (head(shared) - head(separate)).abs().max() < 2e-5
    wanted = gradient(model, separate)
    assert found.keys() == wanted.keys()
    whole = torch.cat([g.flatten() for g in wanted.values()]).norm()
    for name, g in wanted.items():
        assert (found[name] - g).norm() < 1e-5 * max(g.norm(), 1e-3 * whole), name
