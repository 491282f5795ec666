"""Attention sites wrap the implementation that the model uses, and leave its configuration alone."""

import pytest
import torch
from shaken import cache_of

import petune
from petune.testing import tiny_batch, tiny_model


def prefixed(family, attention, **extra):
    model = tiny_model(family, attention=attention)
    torch.manual_seed(0)
    petune.attach(model, "prefix-tuning", length=4, **extra)
    with torch.no_grad():
        for p in petune.tunings(model)["default"].parameters():
            p.normal_(std=0.5)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "qwen", "roberta"])
@pytest.mark.parametrize("padding", [0, 3])
def test_eager_equals_sdpa(family, padding):
    batch = tiny_batch(family, padding=padding)
    eager, sdpa = (prefixed(family, a)(**batch).loss for a in ("eager", "sdpa"))
    torch.testing.assert_close(eager, sdpa, rtol=1e-5, atol=1e-5)


def test_the_configuration_stays():
    for attention in ("eager", "sdpa"):
        model = prefixed("llama", attention)
        assert model.config._attn_implementation == attention
        model.set_attn_implementation("eager")
        assert model.config._attn_implementation == "eager"
        assert model(**tiny_batch("llama")).loss.isfinite()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prefix_is_what_a_cache_of_its_keys_and_values_is(family):
    """transformers' own past_key_values with the same keys and values, positions of the text unchanged."""
    model, base = prefixed(family, "sdpa"), tiny_model(family)
    batch = tiny_batch(family, padding=0)
    rows = len(batch["input_ids"])
    cache = cache_of(petune.tunings(model)["default"], rows)
    positions = torch.arange(10)[None].expand(rows, -1)
    with torch.no_grad():
        want = base(
            input_ids=batch["input_ids"], past_key_values=cache, position_ids=positions
        ).logits
        got = model(input_ids=batch["input_ids"]).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_static_cache_and_no_cache():
    model = prefixed("llama", "sdpa")
    ids = tiny_batch("llama", padding=0)["input_ids"]
    kwargs = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    want = model.generate(ids, use_cache=False, **kwargs)
    assert torch.equal(
        model.generate(
            ids, cache_implementation="static", disable_compile=True, **kwargs
        ),
        want,
    )
    assert torch.equal(model.generate(ids, **kwargs), want)


def test_other_models_are_left_alone():
    batch = tiny_batch("llama")
    before = tiny_model("llama")(**batch).logits
    prefixed("llama", "sdpa")
    assert torch.equal(tiny_model("llama")(**batch).logits, before)


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_equals_sdpa():
    """Its block mask is extended; on CPU it runs forward only."""
    batch = tiny_batch("llama")
    seen = batch["attention_mask"].bool()
    flex, sdpa = (
        prefixed("llama", a)(**batch).logits[seen] for a in ("flex_attention", "sdpa")
    )
    torch.testing.assert_close(flex, sdpa, rtol=1e-4, atol=1e-5)
