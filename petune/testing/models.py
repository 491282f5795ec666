"""Tiny random models of each family: the structure of the real ones, built in milliseconds."""

from __future__ import annotations

import copy
import tempfile
from functools import cache
from typing import Any, NamedTuple

import torch
import transformers

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


class Family(NamedTuple):
    """How to build a tiny model of a family.

    Args:
        config: the name of the configuration's class in transformers.
        model: the name of the model's class.
        head: what `petune.from_pretrained` calls its head.
        scale: how much larger than fresh ones its weights are. Fresh weights are so small that every change drowns in
            rounding; T5's are not.
        arguments: of the configuration.
    """

    config: str
    model: str
    head: str
    scale: float
    arguments: dict[str, Any]


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaConfig",
        "LlamaForCausalLM",
        "causal-lm",
        4.0,
        _LLAMA | {"num_key_value_heads": 2},
    ),
    "qwen": Family(
        "Qwen3Config",
        "Qwen3ForCausalLM",
        "causal-lm",
        4.0,
        _LLAMA | {"num_key_value_heads": 2, "head_dim": 16},
    ),
    "gpt2": Family("GPT2Config", "GPT2LMHeadModel", "causal-lm", 4.0, _GPT2),
    "bert": Family(
        "BertConfig",
        "BertForSequenceClassification",
        "sequence-classification",
        4.0,
        _BERT,
    ),
    "roberta": Family(
        "RobertaConfig",
        "RobertaForSequenceClassification",
        "sequence-classification",
        4.0,
        _BERT | {"pad_token_id": 1, "bos_token_id": 0},
    ),
    "t5": Family(
        "T5Config",
        "T5ForConditionalGeneration",
        "seq2seq-lm",
        1.0,
        _T5 | {"decoder_start_token_id": 0},
    ),
}
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")
"""What configurations call their number of blocks."""
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
    if precision in DTYPES:
        fresh = _fresh(FAMILIES[family], attention, layers)
        return fresh.to(device, DTYPES[precision]).eval()
    from petune.loading.models import from_pretrained  # seconds, and rarely needed

    plain = _built(family, "fp32", attention, layers, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        model: Any = from_pretrained(
            folder,
            precision=precision,
            head=FAMILIES[family].head,
            attn_implementation=attention,
            device_map=device,
        )
    return model.eval()


def _fresh(family: Family, attention: str, layers: int) -> Any:
    """A model of the family with random weights, the same at every call."""
    depth = {key: layers for key in DEPTHS if key in family.arguments}
    options = {**family.arguments, **depth, "attn_implementation": attention}
    config = getattr(transformers, family.config)(**options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, family.model)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(family.scale)
    return model


def tiny_batch(
    family: str, rows: int = 2, length: int = 10, padding: int = 3
) -> dict[str, torch.Tensor]:
    """A batch with labels, its first row padded on the right."""
    head, arguments = FAMILIES[family].head, FAMILIES[family].arguments
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
