"""Tiny random models of each family: the structure of the real ones, built in milliseconds."""

from __future__ import annotations

import copy
import tempfile
from functools import cache
from typing import Any

import torch
import transformers

import petune

VOCABULARY, LAYERS = 128, 3
_IDS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA = _IDS | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_BERT = _LLAMA | {
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "num_labels": 3,
}
_GPT2 = _IDS | {
    "n_embd": 64,
    "n_inner": 128,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 128,
}
_GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_T5 = _IDS | {
    "d_model": 64,
    "d_ff": 128,
    "d_kv": 16,
    "num_heads": 4,
    "num_layers": LAYERS,
    "dropout_rate": 0.0,
}

# family: the configuration's class, the model's, the head, how much larger than fresh its weights are (fresh ones
# are so small that every change drowns in rounding; T5's are not), the configuration
FAMILIES: dict[str, tuple[str, str, str, float, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        "causal-lm",
        4.0,
        _LLAMA | {"num_key_value_heads": 2},
    ),
    "qwen": (
        "Qwen3Config",
        "Qwen3ForCausalLM",
        "causal-lm",
        4.0,
        _LLAMA | {"num_key_value_heads": 2, "head_dim": 16},
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", "causal-lm", 4.0, _GPT2),
    "bert": (
        "BertConfig",
        "BertForSequenceClassification",
        "sequence-classification",
        4.0,
        _BERT,
    ),
    "roberta": (
        "RobertaConfig",
        "RobertaForSequenceClassification",
        "sequence-classification",
        4.0,
        _BERT | {"pad_token_id": 1, "bos_token_id": 0},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        "seq2seq-lm",
        1.0,
        _T5 | {"decoder_start_token_id": 0},
    ),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def tiny_model(
    family: str,
    precision: str = "fp32",
    attention: str = "sdpa",
    *,
    layers: int = LAYERS,
    device: str = "cpu",
) -> Any:
    """A tiny model in evaluation mode, the same at every call."""
    return copy.deepcopy(_built(family, precision, attention, layers, device))


@cache
def _built(
    family: str, precision: str, attention: str, layers: int, device: str
) -> Any:
    config_class, model_class, head, scale, arguments = FAMILIES[family]
    if precision not in DTYPES:  # loaded by its quantizer, as a user's model is
        options: dict[str, Any] = {
            "attn_implementation": attention,
            "device_map": device,
        }
        with tempfile.TemporaryDirectory() as folder:
            _built(family, "fp32", attention, layers, "cpu").save_pretrained(folder)
            made: Any = petune.from_pretrained(
                folder, precision=precision, head=head, **options
            )
            return made.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        depth = {
            key: layers
            for key in ("num_hidden_layers", "n_layer", "num_layers")
            if key in arguments
        }
        config = getattr(transformers, config_class)(**arguments | depth)
        model = getattr(transformers, model_class)._from_config(
            config, attn_implementation=attention
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model.to(device, DTYPES[precision]).eval()


def tiny_batch(
    family: str, rows: int = 2, length: int = 10, padding: int = 3
) -> dict[str, torch.Tensor]:
    """A batch with labels, its first row padded on the right."""
    head, arguments = FAMILIES[family][2], FAMILIES[family][4]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        mask[0, -padding:] = 0
    ids = ids.masked_fill(mask == 0, arguments["pad_token_id"])
    if head == "sequence-classification":
        labels = torch.arange(rows) % 3
    elif head == "seq2seq-lm":
        labels = torch.randint(4, VOCABULARY, (rows, 7), generator=generator)
    else:
        labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
