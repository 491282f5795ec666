"""Merging: into dense and quantized layers, in order, and never half."""

import pytest
import torch
from torch import nn

import petune
from petune.merge import dequantize, is_quantized
from petune.testing import tiny_batch, tiny_model
from petune.testing.behaviours import logits


def changed(model, method, name="default", **arguments):
    tuning = petune.attach(model, method, name=name, **arguments)
    with torch.no_grad():
        for p in tuning.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return tuning


def test_the_weight_is_the_formula():
    model = tiny_model("llama")
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.weight.clone()
    tuning = changed(model, "lora", rank=4, alpha=2)
    a, b = (getattr(tuning.adapters["model.layers.0.self_attn.q_proj"], n).detach() for n in "AB")
    tuning.merge()
    torch.testing.assert_close(layer.weight, before + 0.5 * b @ a, rtol=1e-5, atol=1e-6)
    assert type(layer) is nn.Linear
    assert layer.bias is None


def test_a_base_without_bias_gets_one_if_needed():
    model = tiny_model("llama")
    before = set(model.state_dict())
    changed(model, "bitfit", where="q").merge()
    assert set(model.state_dict()) - before == {f"model.layers.{i}.self_attn.q_proj.bias" for i in range(3)}


def test_several_merge_one_by_one():
    model, batch = tiny_model("llama"), tiny_batch("llama")
    one, two = changed(model, "lora", "one"), changed(model, "lora", "two")
    before = logits(model, batch)
    two.merge()
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-3, atol=1e-4)
    one.merge()
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-3, atol=1e-4)
    assert petune.tunings(model) == {}


def test_an_order_that_matters_is_refused():
    model, batch = tiny_model("llama"), tiny_batch("llama")
    inner, outer = changed(model, "ia3", "inner"), changed(model, "lora", "outer")
    before = logits(model, batch)
    with pytest.raises(petune.PetuneError, match="merge 'inner' first"):
        outer.merge()
    assert torch.equal(logits(model, batch), before)
    inner.merge()
    outer.merge()
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-3, atol=1e-4)


def test_a_merge_that_is_not_finite_changes_nothing():
    model = tiny_model("llama")
    tuning = changed(model, "lora")
    state = {k: v.clone() for k, v in model.state_dict().items() if "petune" not in k}
    with torch.no_grad():
        tuning.links[-1].adapter.B[0, 0] = float("nan")
    with pytest.raises(petune.PetuneError, match="down_proj: the merged weights are not finite"):
        tuning.merge()
    assert "default" in petune.tunings(model)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())


def test_a_quantized_model_merges_to_one_that_transformers_loads(tmp_path):
    from transformers import AutoModelForCausalLM

    model, batch = tiny_model("llama", "nf4"), tiny_batch("llama")
    changed(model, "ia3").merge()
    assert is_quantized(model.model.layers[0].self_attn.q_proj)
    assert not is_quantized(model.model.layers[0].self_attn.k_proj)
    before = logits(model, batch)
    dequantize(model)
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(again.config, "quantization_config")
    torch.testing.assert_close(logits(again, batch), before, rtol=1e-4, atol=1e-4)


def test_an_embedding_that_scales_its_rows_is_refused():
    """Gemma's: what it answers is not what it stores, so answers must not be stored."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    tuning = changed(model, "trainable-tokens", ids=[5], where="embed")
    with pytest.raises(TypeError, match="embed_tokens changes its rows"):
        tuning.merge()
    assert "default" in petune.tunings(model)


def test_a_tied_head_is_untied_where_only_it_changes():
    model, batch = tiny_model("gpt2"), tiny_batch("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    table = model.transformer.wte.weight.clone()
    tuning = changed(model, "lora", where="head")
    before = logits(model, batch)
    tuning.merge()
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.transformer.wte.weight, table)
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize(("kind", "name"), [("mixtral", "MixtralForCausalLM"), ("mamba", "MambaForCausalLM")])
def test_parameters_beside_submodules_train_save_and_merge(kind, name, tmp_path):
    """Stacked experts, a state-space mixer that reads its submodules' weights itself."""
    from petune_bench.coverage import checks, tiny

    model = tiny.build(kind, "causal-lm", name)
    inputs = tiny.batch(model)
    tuning = petune.attach(model, "last-layers")
    trained = dict(tuning.state())
    assert [k for k in trained if "/" in k or "experts.module." in k]
    with torch.no_grad():
        for p in tuning.parameters():
            p.mul_(1.5)
    want = checks.output(model, inputs)
    tuning.save(tmp_path)
    tuning.merge()
    torch.testing.assert_close(checks.output(model, inputs), want, rtol=1e-5, atol=1e-5)
    fresh = tiny.build(kind, "causal-lm", name)
    petune.load(fresh, tmp_path)
    torch.testing.assert_close(checks.output(fresh, inputs), want, rtol=1e-5, atol=1e-5)
