"""Weight-only 8-bit bases: what is quantized, what backward keeps, and what a saved model is."""

import importlib.util

import pytest
import torch

import petune
from petune import PetuneError
from petune.core.frozen.modules import features
from petune.testing import tiny_batch, tiny_model
from petune.testing.case import logits
from petune_plugins import torchao as plugin

pytest.importorskip("torchao")
PRECISION = "int8wo"


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_the_base_is_quantized_and_the_head_is_not(family):
    from petune_plugins.torchao.layers import QuantizedConv1D, QuantizedLinear

    model, dense = tiny_model(family, PRECISION), tiny_model(family)
    outside = {"lm_head", "classifier", "bert.pooler.dense"}
    kinds = {
        type(m)
        for n, m in model.named_modules()
        if features(m) is not None and n not in outside
    }
    assert kinds == {QuantizedConv1D if family == "gpt2" else QuantizedLinear}
    batch = tiny_batch(family)
    off = (logits(model, batch) - logits(dense, batch)).norm() / logits(
        dense, batch
    ).norm()
    assert 0 < off < 0.05


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_backward_keeps_no_dense_weight(family):
    """Torchao's own forward leaves a float copy of each weight to autograd."""
    blocks = (
        tiny_model(family, PRECISION).requires_grad_(False).base_model
    )  # without the dense head
    x = torch.randn(2, 10, 64, requires_grad=True)
    shapes = {
        tuple(m.weight.shape)
        for m in blocks.modules()
        if type(m).__name__.startswith("Quantized")
    }
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(tuple(t.shape)) or t, lambda t: t
    ):
        blocks(inputs_embeds=x).last_hidden_state.square().sum().backward()
    assert shapes
    assert kept
    assert not {s for s in kept if s in shapes or s[::-1] in shapes}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_gradient_is_that_of_the_dense_layer(family):
    layer = next(
        m
        for m in tiny_model(family, PRECISION).modules()
        if type(m).__name__.startswith("Quantized")
    )
    dense = (
        layer.weight.dequantize() if family == "gpt2" else layer.weight.dequantize().T
    )
    x = torch.randn(3, 5, dense.shape[0], requires_grad=True)
    y, want = layer(x), x @ dense + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(y)
    one, other = (torch.autograd.grad(out, x, grad)[0] for out in (y, want))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_saved_model_loads_as_it_was(family, tmp_path):
    model, batch = tiny_model(family, PRECISION), tiny_batch(family)
    model.save_pretrained(tmp_path)
    again = petune.from_pretrained(tmp_path)
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]


def test_without_torchao_the_remedy_is_said(tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        plugin, "find_spec", lambda name: None if name == "torchao" else found(name)
    )
    with pytest.raises(PetuneError, match="needs torchao: pip install torchao"):
        petune.from_pretrained(tmp_path, precision=PRECISION)
