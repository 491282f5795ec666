"""Rows laid end to end give the loss and the gradients of the padded batch."""

import pytest
import torch
import transformers

import petune
from petune.testing import tiny_batch, tiny_model
from petune.tune.packing import check, flatten, packed

SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "sliding_window": 4}  # fmt: skip


def built(name):
    torch.manual_seed(0)
    if name == "gemma2":
        config = transformers.Gemma2Config(**SIZES, attn_logit_softcapping=5.0)
        return transformers.Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
    if name == "gemma3":
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SIZES, layer_types=kinds))
    family, _, attention = name.partition(" ")
    return tiny_model(family, attention=attention or "sdpa")


def uneven():
    batch = tiny_batch("llama", rows=4, length=12)
    for row, gap in ((1, 5), (2, 9)):
        batch["attention_mask"][row, -gap:] = 0
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


@pytest.mark.parametrize("name", ["llama", "llama eager", "gpt2", "qwen", "gemma2", "gemma3"])
@pytest.mark.parametrize("method", ["lora", "prefix-tuning", "houlsby"])
def test_equal_to_the_padded_batch(name, method):
    model = built(name).train()
    torch.manual_seed(0)
    tuning = petune.attach(model, method)
    with torch.no_grad():
        for p in tuning.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    for batch in (uneven(), tiny_batch("llama", rows=1, padding=0)):
        plain = model(**batch, use_cache=False).loss
        gradients = torch.autograd.grad(plain, tuning.parameters())
        check(model, tuning)
        flat, rows = flatten(batch)
        assert flat["input_ids"].shape == (1, int(batch["attention_mask"].sum()))
        with packed(rows):
            loss = model(**flat, use_cache=False).loss
            found = torch.autograd.grad(loss, tuning.parameters())
        torch.testing.assert_close(loss, plain)
        for one, other in zip(found, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_who_can_not_be_packed():
    model = tiny_model("llama")
    with pytest.raises(petune.PetuneError, match="virtual tokens"):
        check(model, petune.attach(model, "prompt-tuning"))
    for family in ("t5", "bert"):
        model = tiny_model(family)
        with pytest.raises(petune.PetuneError, match="end to end"):
            check(model, petune.attach(model, "lora"))
