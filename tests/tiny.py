"""Tiny random models of each family: the same structure as the real ones, built in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCAB, HIDDEN, INNER, LAYERS = 128, 64, 128, 3
COMMON = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    **COMMON, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
BERT = {**LLAMA, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "num_labels": 3}
GPT2 = {**COMMON, "n_embd": HIDDEN, "n_inner": INNER, "n_layer": LAYERS, "n_head": 4, "n_positions": 128}
GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
T5 = {
    **COMMON, "d_model": HIDDEN, "d_ff": INNER, "d_kv": 16, "num_heads": 4, "num_layers": LAYERS,
    "dropout_rate": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA),
    "qwen": ("Qwen3Config", "Qwen3ForCausalLM", {**LLAMA, "head_dim": 16}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "bert": ("BertConfig", "BertForSequenceClassification", BERT),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", {**BERT, "pad_token_id": 1, "bos_token_id": 0}),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5),
}


def config(family: str) -> Any:
    kind, _, arguments = FAMILIES[family]
    return getattr(transformers, kind)(**arguments)


def model(family: str, seed: int = 0, **extra: Any) -> Any:
    """A model in evaluation mode; `attn_implementation` and other configuration come in `extra`."""
    torch.manual_seed(seed)
    made = config(family)
    attention = extra.pop("attn_implementation", "sdpa")
    for key, value in extra.items():
        setattr(made, key, value)
    built = getattr(transformers, FAMILIES[family][1])._from_config(made, attn_implementation=attention)
    with torch.no_grad():  # fresh weights are so small that every change drowns in rounding
        for p in built.parameters():
            if p.dim() > 1:
                p.mul_(4.0)
    return built.eval()


def batch(family: str, rows: int = 2, length: int = 10, pad: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """A padded batch with labels, as the family's loss wants them."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, (rows, length), generator=g)
    mask = torch.ones_like(ids)
    if pad:
        mask[0, length - pad :] = 0
        ids[0, length - pad :] = config(family).pad_token_id
    if family in ("bert", "roberta"):
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 3}
    if family == "t5":
        labels = torch.randint(4, VOCAB, (rows, 7), generator=g)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def quantize(built: Any, precision: str) -> Any:
    """The model as a quantizer plugin would load it: saved, and loaded in that precision."""
    import tempfile

    import petune

    with tempfile.TemporaryDirectory() as folder:
        built.save_pretrained(folder)
        kind = type(built).__name__
        heads = {"CausalLM": "causal-lm", "LMHeadModel": "causal-lm", "SequenceClassification": "sequence-classification"}
        head = next((h for suffix, h in heads.items() if kind.endswith(suffix)), "seq2seq-lm")
        return petune.from_pretrained(folder, precision=precision, head=head).eval()
