"""A tiny random model of any type in transformers' mapping of causal language models.

Most types need no settings of their own: sizes with known names become small wherever a config has
them, and lists with an entry for each layer are cut. `OWN` has what else a type needs.
"""

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from opsd.models.multimodal import auto_class

LAYERS = 2  # as in SIZES
VOCABULARY = 64

SMALL: dict[int, str] = {
    VOCABULARY: """vocab_size vocab_size_per_layer_input n_vocab padded_vocab_size n_tokens
        unpadded_vocab_size decoder_vocab_size encoder_hash_byte_group_vocab ngram_vocab_size_base
        pronunciation_vocab_size shape_vocab_size""",
    32: """hidden_size d_model n_embd dim embed_dim word_embed_proj_dim embedding_size dim_model
        emb_dim lru_width input_embedding_size hidden_size_global output_embedding_size
        pronunciation_embed_dim shape_embed_dim text_hidden_size adapter_in_dim adapter_out_dim
        adapter_input_size out_hidden_size""",
    48: """intermediate_size ffn_dim d_ff n_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim
        dim_ff shared_expert_intermediate_size intermediate_size_mlp mlp_hidden_size
        dense_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size d_inner
        shared_intermediate_size dff feed_forward_size""",
    16: """moe_intermediate_size moe_shared_expert_intermediate_size expert_intermediate_size
        q_lora_rank kv_lora_rank o_lora_rank mamba_d_head mamba_head_dim index_head_dim rel_extent
        log_scaling_n_floor router_hidden_size ple_embed_dim hc_lowrank""",
    4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads
        decoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts
        num_moe_experts qk_rope_head_dim linear_num_value_heads mamba_n_heads mamba_num_heads
        time_step_rank index_n_heads rotary_dim swa_num_attention_heads linear_num_heads
        mamba_dt_rank adapter_rank index_block_size""",
    2: """num_key_value_heads num_kv_heads n_kv_heads multi_query_group_num linear_num_key_heads
        num_experts_per_tok moe_topk moe_k top_k_experts num_experts_per_token index_topk
        num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers
        num_decoder_layers num_encoder_layers swa_num_key_value_heads zero_expert_num depth
        split_ngram_parts""",
    8: """head_dim attention_head_dim global_head_dim hidden_size_per_layer_input qk_nope_head_dim
        v_head_dim linear_key_head_dim linear_value_head_dim mamba_d_state state_size
        ssm_state_size d_head swa_head_dim swa_v_head_dim linear_head_dim dim_head kv_channels
        make_ngram_vocab_size_divisible_by""",
    1: """n_group topk_group first_k_dense_replace n_shared_experts mamba_n_groups n_groups
        pad_token_id bos_token_id attn_layer_offset""",
    256: """max_position_embeddings n_positions n_ctx max_sequence_length max_seq_len""",
    7: "sliding_window sliding_window_size local_attention_window_len",
    12: "qk_head_dim",
    63: """image_token_id video_token_id audio_token_id image_token_index video_token_index
        vision_start_token_id vision_end_token_id""",
}
SIZES: dict[str, Any] = {name: n for n, names in SMALL.items() for name in names.split()}
SIZES |= {"pad_token_id": 0, "eos_token_id": 2, "mamba_d_ssm": 64}
SIZES |= {"expert_layer_period": 2, "attn_layer_period": 2, "num_kv_shared_layers": 0}

GEMMA_4 = {"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 16}
"""Its full-attention layers have wider heads."""

ASSISTANT = {
    **GEMMA_4,
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}

QWEN_4 = {
    "layer_types": ["linear_attention", "indexed_attention"],
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}

DOTS_3 = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_head_dim": 12,
    "swa_v_head_dim": 8,
}
"""Its layers with a window have other sizes."""

SECTIONS = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}

OWN: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"text_config": {"rope_parameters": SECTIONS}},
    "emu3": {"vocabulary_map": {f"<|visual token {n:06d}|>": n + 32 for n in range(16)}},
    "blt": {
        "global_config": {"hidden_size": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "dots3_note": {"text_config": DOTS_3},
    "dots3_note_text": DOTS_3,
    "gemma4_assistant": {"backbone_hidden_size": 32, "text_config": ASSISTANT},
    "gemma4_unified_assistant": {"backbone_hidden_size": 32, "text_config": ASSISTANT},
    "phi4_multimodal": {
        "audio_config": {
            "nemo_conv_channels": 32,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
        }
    },
    "gemma4_text": GEMMA_4,
    "gemma4_unified_text": GEMMA_4,
    "gemma4": {"text_config": GEMMA_4},
    "gemma4_unified": {"text_config": GEMMA_4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "bailing_hybrid": {"num_expert_group": 1, "topk_group": 1, "layer_group_size": 2},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 100.0}}
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}, "n_heads": 4},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dory": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "mlp"] * 2 + ["full_attention", "mlp"],
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 7},
    "hrm_text": {"num_hidden_layers": 16, "num_layers_per_stack": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"qk_head_dim": 12},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "marian": {"d_model": 32},
    "moshi": {"sliding_window": 7},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention"]},
    "qwen4_exp_text": QWEN_4,
    "qwen4_exp": {"text_config": QWEN_4},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 7},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [16, 16],
    },
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"embedding_dim": 32, "num_blocks": 2, "num_heads": 2, "mode": "train"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""Fields that a type needs beside the known sizes."""


def tiny_config(model_type: str, **fields: Any) -> PreTrainedConfig:
    """A small config of the type; `fields` are kept as given."""
    try:
        base = AutoConfig.for_model(model_type)
    except Exception:  # gemma4_assistant's defaults contradict each other
        base = AutoConfig.for_model(model_type, **OWN[model_type])
    values = _small(base.to_dict(), base)
    for name, value in {**OWN.get(model_type, {}), **fields}.items():
        inner = isinstance(value, dict) and isinstance(values.get(name), dict)
        values[name] = {**values[name], **value} if inner else value
    return type(base).from_dict(values)


def tiny_model(model_type: str, **fields: Any) -> PreTrainedModel:
    """A model with random weights, also in norms and biases: 1 and 0 would hide errors."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **fields)
    model = auto_class(config).from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def _small(values: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    layers = getattr(config, "num_hidden_layers", None) or getattr(config, "num_layers", None)
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(getattr(config, name, None), PreTrainedConfig):
            found[name] = _small(value, getattr(config, name))
        elif isinstance(value, list) and layers and len(value) == layers:
            found[name] = _cut(name, value)
        elif isinstance(value, dict) and "mrope_section" in value:
            found[name] = {**value, "mrope_section": [2, 1, 1]}
        elif name == "head_dim" and value is None:  # some configs have no default
            found[name] = SIZES[name]
        elif name in SIZES and isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = SIZES[name]
        else:
            found[name] = value
    if "kv_lora_rank" in found:  # latent attention has keys for each head
        found["num_key_value_heads"] = found.get("num_attention_heads", 4)
        if values.get("head_dim") == values.get("qk_rope_head_dim"):
            found["head_dim"] = found["qk_rope_head_dim"]
    written = "transformers_version _name_or_path architectures torch_dtype dtype per_layer_config"
    for name in written.split():
        found.pop(name, None)
    return found


def _cut(name: str, each: list) -> list:
    """Cut a list with an entry for each layer to `LAYERS`, with the first of each kind."""
    sizes = isinstance(each[0], int) and not isinstance(each[0], bool)
    if sizes and name in SIZES:
        return [SIZES[name]] * LAYERS
    kinds = [kind for number, kind in enumerate(each) if kind not in each[:number]]
    return (kinds * LAYERS)[:LAYERS]


def all_types() -> list[str]:
    """Every type of AutoModelForCausalLM's mapping."""
    return sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
