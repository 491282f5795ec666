"""Rows laid end to end give the loss and the gradients of the padded batch."""

import pytest
import torch
import transformers

import petune
from petune.testing import tiny_batch, tiny_model
from petune.training.packing import flatten, is_padded, packed, refusal

SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "sliding_window": 4}  # fmt: skip


def built(name):
    torch.manual_seed(0)
    if name == "gemma2":
        config = transformers.Gemma2Config(**SIZES, attn_logit_softcapping=5.0)
        return transformers.Gemma2ForCausalLM._from_config(
            config, attn_implementation="eager"
        )
    if name == "gemma3":
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        return transformers.Gemma3ForCausalLM(
            transformers.Gemma3TextConfig(**SIZES, layer_types=kinds)
        )
    family, _, attention = name.partition(" ")
    return tiny_model(family, attention=attention or "sdpa")


def uneven():
    batch = tiny_batch("llama", rows=4, length=12)
    for row, gap in ((1, 5), (2, 9)):
        batch["attention_mask"][row, -gap:] = 0
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


@pytest.mark.parametrize(
    "name", ["llama", "llama eager", "gpt2", "qwen", "gemma2", "gemma3"]
)
@pytest.mark.parametrize("method", ["lora", "prefix-tuning", "houlsby", "loreft"])
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
        assert not refusal(model)
        flat, rows = flatten(batch)
        assert flat["input_ids"].shape == (1, int(batch["attention_mask"].sum()))
        with packed(rows):
            loss = model(**flat, use_cache=False).loss
            found = torch.autograd.grad(loss, tuning.parameters())
        torch.testing.assert_close(loss, plain)
        for one, other in zip(found, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_which_batches_are_worth_it():
    batch = uneven()
    assert is_padded(batch)
    assert not is_padded(tiny_batch("llama", rows=2, padding=0))
    assert not is_padded({**batch, "weights": torch.ones(4)}), (
        "a row's own values have no place among tokens"
    )
    assert not is_padded(
        {key: value for key, value in batch.items() if key != "labels"}
    )


def refused(model, method):
    petune.attach(model, method)
    return refusal(model)


def test_who_can_not_be_packed():
    model = tiny_model("llama")
    assert "virtual tokens" in refused(model, "prompt-tuning")
    for family in ("t5", "bert"):
        model = tiny_model(family)
        assert "end to end" in refused(model, "lora")


def test_a_model_that_wants_more_than_ids_is_left_alone(monkeypatch):
    model = tiny_model("llama")
    petune.attach(model, "lora")
    assert not refusal(model)

    def forward(input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return kwargs["pixels"]

    monkeypatch.setattr(model, "forward", forward)
    assert "end to end" in refusal(model)


def test_a_block_that_mixes_tokens_beside_its_attention_is_found_out_by_a_trial():
    """Falcon-H1's blocks hold a state-space mixer beside an attention that asks the interface."""
    sizes = SIZES | {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    }
    sizes.pop("sliding_window")
    torch.manual_seed(0)
    model = transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**sizes))
    assert "end to end" in refused(model, "lora")
    assert model.training is False or all(m.training for m in model.modules()), (
        "the trial leaves the modes alone"
    )
