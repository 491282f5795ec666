"""Merging: into dense and quantized layers, in order, and never half."""

import copy
import itertools

import pytest
import torch
from shaken import shaken
from torch import nn
from transformers import AutoModelForCausalLM

import petune
from petune.core.attached.quantized import dequantize
from petune.core.attached.targets import LinearTarget
from petune.core.frozen.weights import dense, is_quantized
from petune.core.registry.plugins import registry
from petune.testing import tiny_batch, tiny_model
from petune.testing.case import logits


def test_the_weight_is_the_formula():
    model = tiny_model("llama")
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.weight.clone()
    tuning = shaken(model, "lora", rank=4, alpha=2)
    a, b = (
        getattr(tuning.adapters["model.layers.0.self_attn.q_proj"], n).detach()
        for n in "AB"
    )
    tuning.merge()
    torch.testing.assert_close(layer.weight, before + 0.5 * b @ a, rtol=1e-5, atol=1e-6)
    assert type(layer) is nn.Linear
    assert layer.bias is None


def test_a_base_without_bias_gets_one_if_needed():
    model = tiny_model("llama")
    before = set(model.state_dict())
    shaken(model, "bitfit", where="q").merge()
    added = (
        set(model.state_dict()) - before
    )  # all of its attention: the configuration knows no less
    assert added == {
        f"model.layers.{i}.self_attn.{role}_proj.bias"
        for i in range(3)
        for role in "qkvo"
    }
    assert model.model.layers[0].self_attn.q_proj.bias.any()
    assert not model.model.layers[0].self_attn.k_proj.bias.any()


def test_several_merge_one_by_one():
    model, batch = tiny_model("llama"), tiny_batch("llama")
    one, two = shaken(model, "lora", "one"), shaken(model, "lora", "two")
    before = logits(model, batch)
    two.merge()
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-3, atol=1e-4)
    one.merge()
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-3, atol=1e-4)
    assert petune.tunings(model) == {}


def test_an_order_that_matters_is_refused():
    model, batch = tiny_model("llama"), tiny_batch("llama")
    inner, outer = shaken(model, "ia3", "inner"), shaken(model, "lora", "outer")
    before = logits(model, batch)
    with pytest.raises(petune.PetuneError, match="merge 'inner' first"):
        outer.merge()
    assert torch.equal(logits(model, batch), before)
    inner.merge()
    outer.merge()
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-3, atol=1e-4)


def test_a_merge_that_is_not_finite_changes_nothing():
    model = tiny_model("llama")
    tuning = shaken(model, "lora")
    state = {k: v.clone() for k, v in model.state_dict().items() if "petune" not in k}
    with torch.no_grad():
        tuning.links[-1].adapter.B[0, 0] = float("nan")
    with pytest.raises(
        petune.PetuneError, match="down_proj: the merged weights are not finite"
    ):
        tuning.merge()
    assert "default" in petune.tunings(model)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())


def test_a_quantized_model_merges_to_one_that_transformers_loads(tmp_path):
    model, batch = tiny_model("llama", "nf4"), tiny_batch("llama")
    shaken(model, "ia3").merge()
    assert is_quantized(model.model.layers[0].self_attn.q_proj)
    assert not is_quantized(model.model.layers[0].self_attn.k_proj)
    before = logits(model, batch)
    dequantize(model)
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(again.config, "quantization_config")
    torch.testing.assert_close(logits(again, batch), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("precision", "most"),
    [("nf4", 0.1), ("fp4", 0.13), ("int8", 0.01), ("int8wo", 0.01)],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_quantized_layer_is_quantized_again_at_the_cost_that_is_said(
    family, precision, most, tmp_path
):
    if precision == "int8wo":
        pytest.importorskip("torchao")
    model, batch = tiny_model(family, precision), tiny_batch(family)
    tuning = shaken(model, "lora")
    name = (
        "model.layers.1.mlp.up_proj"
        if family == "llama"
        else "transformer.h.1.mlp.c_fc"
    )
    layer, wanted = (
        model.get_submodule(name),
        dense(copy.deepcopy(model).get_submodule(name)),
    )
    a, b = (getattr(tuning.adapters[name], n).detach() for n in "AB")
    change = 2 * b @ a
    wanted = (wanted.weight.T if family == "gpt2" else wanted.weight) + change
    kinds = {
        n: type(m).__name__ for n, m in tiny_model(family, precision).named_modules()
    }
    merged = tuning.merge(quantize=True)
    assert {n: type(m).__name__ for n, m in model.named_modules()} == kinds
    layer = dense(model.get_submodule(name)).weight
    error = ((layer.T if family == "gpt2" else layer) - wanted).norm()
    assert merged.errors[name] == pytest.approx(float(error / wanted.norm()), rel=1e-3)
    assert merged.losses[name] == pytest.approx(float(error / change.norm()), rel=1e-3)
    assert 0 < max(merged.errors.values()) < most
    assert f"worst {max(merged.errors.values()):.2g}" in str(merged)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits(petune.from_pretrained(tmp_path), batch), logits(model, batch)
    )


def test_training_on_a_quantized_base_is_quantized_back():
    """Copies that trained in float32 too."""
    model = tiny_model("llama", "nf4")
    kinds = [type(m) for m in model.modules()]
    tuning = shaken(model, "last-layers")
    wanted = (
        tuning.adapters["model.layers.2.mlp.up_proj"].module.weight.detach().clone()
    )
    merged = tuning.merge(quantize=True)
    assert [type(m) for m in model.modules()] == kinds
    stored = dense(model.model.layers[2].mlp.up_proj).weight
    error = float((stored - wanted).norm() / wanted.norm())
    assert merged.errors["model.layers.2.mlp.up_proj"] == pytest.approx(error, rel=1e-3)


def test_rounding_to_16_bits_is_said():
    merged = shaken(tiny_model("llama", "bf16"), "lora").merge()
    assert 0 < max(merged.errors.values()) < 2**-8
    merged = shaken(tiny_model("llama"), "lora").merge()
    assert max(merged.errors.values()) == 0


def test_a_layer_that_no_quantizer_knows_is_not_quantized_again(monkeypatch):
    model, batch = tiny_model("llama", "nf4"), tiny_batch("llama")
    tuning = shaken(model, "lora")
    before = logits(model, batch)
    monkeypatch.setitem(registry()._found, "petune_quantizers", {})
    with pytest.raises(
        petune.UnsupportedError, match="no installed quantizer can write a Linear4bit"
    ):
        tuning.merge(quantize=True)
    assert torch.equal(logits(model, batch), before)
    tuning.merge()


@pytest.mark.parametrize("quantize", [False, True])
def test_an_interrupted_merge_leaves_what_the_model_computes(quantize, monkeypatch):
    """Layers are written one by one, and each gives up its adapter: the rest goes on, also later."""
    model, batch = tiny_model("llama"), tiny_batch("llama")
    tuning = shaken(model, "lora")
    before = logits(model, batch)
    count, write = itertools.count(), LinearTarget.write

    def interrupted(self, merged):
        if next(count) == 5:
            raise KeyboardInterrupt
        write(self, merged)

    monkeypatch.setattr(LinearTarget, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuning.merge(quantize=quantize)
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-4, atol=1e-5)
    assert len(tuning.links) == 21 - 5
    tuning.merge()
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-4, atol=1e-5)
    assert petune.tunings(model) == {}


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_a_saved_model_keeps_the_biases_that_a_merge_adds(precision, tmp_path):
    model, batch = tiny_model("llama", precision), tiny_batch("llama")
    shaken(model, "bitfit", where="q").merge()
    dequantize(model)
    assert (model.config.attention_bias, model.config.mlp_bias) == (True, False)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(petune.from_pretrained(tmp_path), batch), logits(model, batch)
    )


def test_biases_that_no_saved_model_has_a_place_for_are_said():
    model = tiny_model("t5")
    with pytest.warns(
        UserWarning,
        match=r"a saved t5 has no place for encoder.block.0.*\.q\.bias and 8 more",
    ):
        shaken(model, "bitfit", where="q").merge()


def test_a_quantized_conv1d_merges_to_one_that_transformers_loads(tmp_path):
    model, batch = tiny_model("gpt2", "nf4"), tiny_batch("gpt2")
    shaken(model, "lora").merge()
    dequantize(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(again, batch), logits(model, batch), rtol=1e-4, atol=1e-4
    )


def test_an_embedding_that_scales_its_rows_is_refused():
    """Gemma's: what it answers is not what it stores, so answers must not be stored."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "head_dim": 16,
    }
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    ).eval()
    tuning = shaken(model, "trainable-tokens", ids=[5], where="embed")
    with pytest.raises(TypeError, match="embed_tokens changes its rows"):
        tuning.merge()
    assert "default" in petune.tunings(model)


def test_a_norm_takes_a_scale_and_a_shift():
    model, batch = tiny_model("bert"), tiny_batch("bert")
    norm = model.bert.encoder.layer[0].output.LayerNorm
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    tuning = shaken(model, "ln-tuning")
    adapter = tuning.adapters["bert.encoder.layer.0.output.LayerNorm"]
    weight, bias = (
        norm.weight * adapter.scale,
        norm.bias * adapter.scale + adapter.shift,
    )
    before = logits(model, batch)
    tuning.merge()
    torch.testing.assert_close(norm.weight, weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.bias, bias, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_norm_that_adds_one_to_its_weight():
    """Gemma's, also in bfloat16."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    from petune.core.frozen.norms import probe_norm

    norm, scale = Gemma3RMSNorm(63), torch.randn(63)
    norm.weight.normal_()
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        norm.to(dtype)
        weight, bias = probe_norm(lambda x: norm(x) * scale.to(x.dtype), norm, norm)
        torch.testing.assert_close(
            weight, scale * (1 + norm.weight.float()) - 1, rtol=near, atol=near
        )
        assert float(bias.abs().max()) == 0


def test_what_is_no_scale_and_shift_of_a_norm_is_refused():
    model = tiny_model("llama")
    for where, message in (
        ("norm", "does more to .* than scale and shift it"),
        ("mlp", "has no merged form"),
    ):
        tuning = shaken(model, "lora", where=where)
        with pytest.raises(TypeError, match=message):
            tuning.merge()
        tuning.detach()
    inner, outer = (
        shaken(model, "ln-tuning", "inner"),
        shaken(model, "ln-tuning", "outer"),
    )
    before = logits(model, tiny_batch("llama"))
    outer.merge()  # scales alone commute
    torch.testing.assert_close(
        logits(model, tiny_batch("llama")), before, rtol=1e-3, atol=1e-4
    )
    inner.merge()
    torch.testing.assert_close(
        logits(model, tiny_batch("llama")), before, rtol=1e-3, atol=1e-4
    )
    model = tiny_model("bert")
    shaken(model, "ln-tuning", "inner")
    with pytest.raises(petune.PetuneError, match="merge 'inner' first"):
        shaken(model, "ln-tuning", "outer").merge()


def test_a_tied_head_is_untied_where_only_it_changes():
    model, batch = tiny_model("gpt2"), tiny_batch("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    table = model.transformer.wte.weight.clone()
    tuning = shaken(model, "lora", where="head")
    before = logits(model, batch)
    tuning.merge()
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.transformer.wte.weight, table)
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("kind", "name"), [("mixtral", "MixtralForCausalLM"), ("mamba", "MambaForCausalLM")]
)
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
