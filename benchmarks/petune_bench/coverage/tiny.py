"""A tiny random model of any architecture that transformers maps, from its configuration class alone."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

HEADS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question-answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "seq2seq-lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
MOST = 5_000_000
"""Parameters of a model that counts as small."""
VOCABULARY = 128
# the first pattern that fits the whole of a configuration's key gives its small value
SIZES: list[tuple[str, int]] = [
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|topk_group|n_group|num_expert_group", 2),
    (r"type_vocab_size|.*_per_(?!layer_input).*", 0),  # 0: as it is
    (r"(.*_)?vocab_size.*|vocab_offset", VOCABULARY),
    (r"pad_token_id|unk_index|pad_index", -1),
    (r"bos_token_id|bos_index|decoder_start_token_id|cls_token_id", 1),
    (r"eos_token_id|eos_index|sep_token_id|eod_token_id", 2),
    (r".*_token_id|.*_token_index|mask_index|tag_pad_id|subs_pad_id", 3),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target|encoder_position|decoder_position).*",
        128,
    ),
    (r"(.*_)?(layers|num_hidden_layers|n_layers?|num_layers|num_blocks|depth|num_(en|de)coder_layers)", 2),
    (r"num_layers_per_stack|num_global_layers|num_self_attends_per_block", 2),
    (r"(swa_)?(num_key_value_heads|num_kv_heads)", 2),
    (r"linear_num_(key|value)_heads|linear_num_heads|num_mel_bins|mamba_n_heads|num_query_groups|index_n_heads", 4),
    (r".*(attention_heads|num_heads|n_heads?|num_(en|de)coder_attention_heads)(_per_layer)?|attention_heads", 4),
    (r"qk_rope_head_dim|v_head_dim|qk_nope_head_dim|index_head_dim|rotary_dim", 16),
    (r"qk_head_dim", 32),
    (r"(.*_)?(head_dim|d_kv|d_head|kv_channels|attention_head_size|dim_head|query_pre_attn_scalar)", 16),
    (
        r".*(intermediate_size|ffn_dim|ffn_hidden_size|inner_dim|n_inner|feed_forward_size|d_ff|dff|d_inner|dim_ff).*",
        128,
    ),
    (r"mlp_dim|intermediate_size_mlp", 128),
    (r".*num_(local_)?experts|n_routed_experts|zero_expert_num", 4),
    (
        r"sliding_window(_size)?|attention_window_size|keep_window_size|window_size|local_attention|attention_chunk_size",
        16,
    ),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|hc_lowrank|laurel_rank|gated_norm_rank|adapter_rank|d_rel|rel_extent", 16),
    (r"(.*_)?(hidden_size|d_model|n_embd|emb_dim|embed_dim|embedding_size|embedding_dim|embed_proj_dim|d_latents)", 64),
    (
        r"(.*_)?(emb_size|hidden_dim|mid_dim|lru_width|output_dim|input_dim)(_global)?|hidden_size_.*|dim|embedding_rank",
        64,
    ),
    (r"true_hidden_size|intra_bottleneck_size|dim_model_base|classifier_proj_size", 64),
    (r"image_size|crop_size|input_size", 32),
    (r"patch_size", 8),
]
# what the names of keys do not tell
_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
_SHARING: dict[str, Any] = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 32, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "canine": {"num_hash_buckets": VOCABULARY},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
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
    "granitemoehybrid": {"mamba_d_head": 32, "layer_types": ["linear_attention", "full_attention"]},
    "got_ocr2": {"image_seq_length": 4},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2, "num_experts": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12},
    "led": {"attention_window": 16},
    "longformer": {"attention_window": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lxmert": {"num_qa_labels": 8, "visual_feat_dim": 64},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "mobilebert": {"intra_bottleneck_size": 32, "true_hidden_size": 32},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_shape": (8, 16), "axial_pos_embds_dim": (16, 48), "hash_seed": 0},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}


def architectures() -> dict[str, dict[str, str]]:
    """{model type: {head: the model's class}} of every text architecture in transformers."""
    found: dict[str, dict[str, str]] = {}
    for head, mapping in HEADS.items():
        for kind, name in getattr(modeling_auto, mapping).items():
            found.setdefault(kind, {})[head] = name if isinstance(name, str) else name[0]
    return dict(sorted(found.items()))


def config(kind: str) -> PretrainedConfig:
    """The small configuration of a model type."""
    plain = AutoConfig.for_model(kind)
    if kind == "encoder-decoder":
        return type(plain).from_encoder_decoder_configs(config("bert"), config("bert"), decoder_start_token_id=1)
    return type(plain)(**small(plain))


def small(plain: PretrainedConfig) -> dict[str, Any]:
    """The arguments that make a configuration small: all its sizes, those of the configurations inside it too."""
    found: dict[str, Any] = {}
    listing, kinds = _layer_kinds(plain)
    for key, value in vars(plain).items():
        if isinstance(value, PretrainedConfig):
            found[key] = {"model_type": value.model_type, **small(value)}
        elif key == listing:
            found[key] = kinds
        elif (isinstance(value, int) and not isinstance(value, bool) and value > 2) or re.fullmatch(
            r"(pad|bos|eos)_token_id", key
        ):
            size = next((size for pattern, size in SIZES if re.fullmatch(pattern, key)), 0)
            if size:
                found[key] = max(size, 0)
    for key in found:
        if key == "num_key_value_heads" and vars(plain).get(key) == vars(plain).get("num_attention_heads"):
            found[key] = 4
        if re.fullmatch(r"num_hidden_layers|n_layers?|num_layers", key) and kinds:
            found[key] = len(kinds)
    return found | MORE.get(plain.model_type, {})


def _layer_kinds(plain: PretrainedConfig) -> tuple[str, list[str]]:
    """The key that lists a kind for each layer, with each kind once, two at least."""
    for key in ("layer_types", "layers_block_type", "block_types"):
        listed = vars(plain).get(key)
        if isinstance(listed, list) and listed:
            kinds = list(dict.fromkeys(listed))
            return key, kinds if len(kinds) > 1 else kinds * 2
    return "", []


def build(kind: str, head: str, name: str) -> PreTrainedModel:
    """A tiny model of a type by its class, in evaluation mode, with weights large enough to matter.

    Raises:
        Exception: whatever stops transformers from building it small and offline.
    """
    cls: Any = getattr(transformers, name)
    whole = config(kind)
    if not isinstance(whole, cls.config_class):  # a text model under the type of a model of several towers
        inside = [value for value in vars(whole).values() if isinstance(value, cls.config_class)]
        whole = inside[0] if inside else whole.get_text_config()
    if head == "causal-lm" and not whole.is_encoder_decoder and hasattr(whole, "is_decoder"):
        whole.is_decoder = True
    if whole.is_encoder_decoder and getattr(whole, "decoder_start_token_id", None) is None:
        whole.decoder_start_token_id = 1
    with torch.device("meta"):
        count = sum(p.numel() for p in cls._from_config(whole).parameters())
    if count > MOST:
        raise ValueError(f"it has {count:,} parameters at the sizes known to the harness")
    torch.manual_seed(0)
    model: PreTrainedModel = cls._from_config(whole).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and 0 < float(parameter.std()) < 0.05:
                parameter.mul_(4)
    return model


def batch(model: PreTrainedModel, rows: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    """Token ids, and what else the model's forward can't do without."""
    generator = torch.Generator().manual_seed(0)
    known = inspect.signature(type(model).forward).parameters
    rows *= getattr(model, "num_codebooks", 1)
    found = {"input_ids": torch.randint(4, VOCABULARY - 8, (rows, length), generator=generator)}
    found["input_ids"][:, [3, 5, -1]] = 2  # where texts end: some read the class there, or the question before it
    more = {
        "bbox": torch.zeros(rows, length, 4, dtype=torch.long),
        "visual_feats": torch.ones(rows, 3, 64),
        "visual_pos": torch.ones(rows, 3, 4),
        "decoder_input_ids": found["input_ids"][:, :7],
    }
    if not model.can_generate():
        del more["decoder_input_ids"]
    return found | {key: value for key, value in more.items() if key in known}
