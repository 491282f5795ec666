"""What makes a configuration small: by the names of its keys, and for some architectures what names do not tell."""

from __future__ import annotations

import re
from typing import Any

VOCABULARY = 128
# the first pattern that fits a whole key decides; 0 leaves it as it is, -1 means zero
_SIZES: list[tuple[int, str]] = [
    (2, r"num_experts_per_tok(en)?|moe_k|moe_topk|topk_group|n_group|num_expert_group"),
    (0, r"type_vocab_size|.*_per_(?!layer_input).*"),
    (VOCABULARY, r"(.*_)?vocab_size.*|vocab_offset"),
    (-1, r"pad_token_id|unk_index|pad_index"),
    (1, r"bos_token_id|bos_index|decoder_start_token_id|cls_token_id"),
    (2, r"eos_token_id|eos_index|sep_token_id|eod_token_id"),
    (3, r".*_token_id|.*_token_index|mask_index|tag_pad_id|subs_pad_id"),
    (128, r"max_position_embeddings|n_positions|n_ctx|max_seq_len"),
    (128, r"max_(source|target|encoder_position|decoder_position).*"),
    (
        2,
        r"(.*_)?(layers|num_hidden_layers|n_layers?|num_layers|num_blocks|depth|num_(en|de)coder_layers)",
    ),
    (2, r"num_layers_per_stack|num_global_layers|num_self_attends_per_block"),
    (2, r"(swa_)?(num_key_value_heads|num_kv_heads)"),
    (
        4,
        r"linear_num_(key|value)_heads|linear_num_heads|num_mel_bins|mamba_n_heads|num_query_groups|index_n_heads",
    ),
    (
        4,
        r".*(attention_heads|num_heads|n_heads?|num_(en|de)coder_attention_heads)(_per_layer)?|attention_heads",
    ),
    (16, r"qk_rope_head_dim|v_head_dim|qk_nope_head_dim|index_head_dim|rotary_dim"),
    (32, r"qk_head_dim"),
    (
        16,
        r"(.*_)?(head_dim|d_kv|d_head|kv_channels|attention_head_size|dim_head|query_pre_attn_scalar)",
    ),
    (
        128,
        r".*(intermediate_size|ffn_dim|ffn_hidden_size|inner_dim|n_inner|feed_forward_size|d_ff|dff|d_inner).*",
    ),
    (128, r".*dim_ff.*|mlp_dim|intermediate_size_mlp"),
    (4, r".*num_(local_)?experts|n_routed_experts|zero_expert_num"),
    (
        16,
        r"sliding_window(_size)?|(attention_|keep_)?window_size|local_attention|attention_chunk_size",
    ),
    (
        16,
        r"q_lora_rank|kv_lora_rank|o_lora_rank|hc_lowrank|laurel_rank|gated_norm_rank|adapter_rank|d_rel|rel_extent",
    ),
    (
        64,
        r"(.*_)?(hidden_size|d_model|n_embd|emb_dim|embed_dim|embedding_size|embedding_dim|embed_proj_dim|d_latents)",
    ),
    (
        64,
        r"(.*_)?(emb_size|hidden_dim|mid_dim|lru_width|output_dim|input_dim)(_global)?|hidden_size_.*|dim",
    ),
    (64, r"embedding_rank|dim_model_base|classifier_proj_size"),
    (32, r"image_size|crop_size|input_size|true_hidden_size|intra_bottleneck_size"),
    (8, r"patch_size"),
]
_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
_SHARING: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 32, "attn_layer_indices": [1]},
    "canine": {"num_hash_buckets": VOCABULARY},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 128, "hidden_size": 64},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 3},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 32},
    "gemma3n_text": {
        **_SHARING,
        "num_kv_shared_layers": 2,
        "intermediate_size": 128,
        "activation_sparsity_pattern": [0.5] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        "mamba_d_head": 32,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "got_ocr2": {"image_seq_length": 4},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2, "num_experts": 4},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12},
    "led": {"attention_window": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 96},
    "longformer": {"attention_window": 16},
    "lxmert": {"num_qa_labels": 8, "visual_feat_dim": 64},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": (8, 16),
        "axial_pos_embds_dim": (16, 48),
        "hash_seed": 0,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
}
"""{model type: changes to its small configuration}."""


def small_size(key: str) -> int | None:
    """The small value of a configuration's key, None if it is no size that is known."""
    found = next((size for size, pattern in _SIZES if re.fullmatch(pattern, key)), 0)
    return max(found, 0) if found else None
