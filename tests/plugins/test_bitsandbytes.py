"""4-bit and 8-bit bases on a CPU: what is quantized, what is not, and that evaluation leaves training alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from samples import IDS, SMALL
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import petune
from petune import PetuneError
from petune_plugins import bitsandbytes as plugin

FOUR_BIT = ["nf4", "nf4-single", "fp4"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(folder)
    return folder


def kinds(model: nn.Module) -> set[type[nn.Module]]:
    return {type(module) for module in model.modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("precision", [*FOUR_BIT, "int8"])
@pytest.mark.parametrize("head", [None, "sequence-classification"])
def test_the_base_is_quantized_and_the_head_is_not(llama, precision, head):
    model = petune.from_pretrained(llama, precision=precision, head=head)
    outside = model.lm_head if head is None else model.score
    assert type(outside) is nn.Linear
    assert outside.weight.dtype == torch.float32
    assert kinds(model.model) == {Linear8bitLt if precision == "int8" else Linear4bit}
    assert torch.isfinite(model(IDS).logits).all()


@pytest.mark.parametrize(
    ("precision", "off"),
    [("nf4", 0.15), ("nf4-single", 0.15), ("fp4", 0.2), ("int8", 0.02)],
)
def test_the_layers_are_the_dense_ones_but_for_rounding(llama, precision, off):
    model, dense = (
        petune.from_pretrained(llama, precision=precision),
        petune.from_pretrained(llama),
    )
    x = torch.randn(8, 64)  # (rows, features)
    name = "model.layers.1.mlp.up_proj"
    ours, theirs = model.get_submodule(name)(x), dense.get_submodule(name)(x)
    assert 0 < (ours - theirs).norm() / theirs.norm() < off


@pytest.mark.parametrize(
    ("precision", "nested", "code"),
    [("nf4", True, "nf4"), ("nf4-single", False, "nf4"), ("fp4", True, "fp4")],
)
def test_a_four_bit_weight_takes_the_bits_that_are_said(llama, precision, nested, code):
    state = (
        petune.from_pretrained(llama, precision=precision)
        .model.layers[0]
        .mlp.up_proj.weight.quant_state
    )
    assert (state.nested, state.quant_type, state.blocksize) == (nested, code, 64)
    assert plugin.petune_quantizers()[precision].bits == (
        4 + 8 / 64 + 32 / 64 / 256 if nested else 4.5
    )


@pytest.mark.parametrize("precision", [*FOUR_BIT, "int8"])
def test_training_goes_on_after_an_evaluation(llama, precision):
    model = petune.from_pretrained(llama, precision=precision).requires_grad_(False)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        model.train()
        embedded = model.get_input_embeddings()(IDS).requires_grad_()
        out = model(inputs_embeds=embedded, labels=IDS)
        out.loss.backward()
        return out.logits.detach(), embedded.grad

    before = step()
    model.eval()
    with torch.no_grad():
        assert torch.isfinite(model(IDS).logits).all()
    for first, second in zip(before, step(), strict=True):
        assert torch.equal(first, second)


def test_layers_do_not_pack_themselves_for_inference(llama):
    model = petune.from_pretrained(llama, precision="nf4")
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    again = petune.from_pretrained(llama, precision="nf4")
    with torch.no_grad():
        model(IDS)
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_fresh_module_in_the_base_stays_dense_too(tmp_path):
    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(tmp_path)  # has no pooler
    model = petune.from_pretrained(
        tmp_path, precision="nf4", head="sequence-classification"
    )
    assert model.petune_fresh == ("bert.pooler", "classifier")
    assert {
        name for name, module in model.named_modules() if type(module) is nn.Linear
    } == {
        "bert.pooler.dense",
        "classifier",
    }


def test_gpt2s_transposed_layers_are_quantized_as_well(tmp_path):
    GPT2LMHeadModel(
        GPT2Config(
            n_embd=64,
            n_layer=1,
            n_head=2,
            vocab_size=96,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).save_pretrained(tmp_path)
    model = petune.from_pretrained(tmp_path, precision="nf4")
    assert kinds(model.transformer) == {Linear4bit}
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("precision", ["nf4", "fp32"])
def test_a_quantized_checkpoint_stays_as_it_is(llama, tmp_path, precision):
    model = petune.from_pretrained(llama, precision="nf4")
    model.save_pretrained(tmp_path)
    again = petune.from_pretrained(tmp_path, precision=precision)
    assert torch.equal(model(IDS).logits, again(IDS).logits)
    assert not again.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu


def test_a_dtype_may_be_asked_for(llama):
    model = petune.from_pretrained(llama, precision="nf4", dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16


def test_nothing_is_said_at_each_forward(llama, caplog, capfd):
    model = petune.from_pretrained(llama, precision="int8")
    model(IDS)
    assert caplog.text == ""
    assert capfd.readouterr().err == ""


def test_a_model_with_nothing_to_quantize_is_an_error(tmp_path, llama, monkeypatch):
    config = plugin._config
    everything = ["model", "lm_head"]
    monkeypatch.setattr(
        plugin, "_config", lambda skip, **options: config(everything, **options)
    )
    with pytest.raises(
        PetuneError, match="no linear layer that could be stored at nf4"
    ):
        petune.from_pretrained(llama, precision="nf4")


def test_without_bitsandbytes_the_remedy_is_said(llama, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        plugin,
        "find_spec",
        lambda name: None if name == "bitsandbytes" else found(name),
    )
    with pytest.raises(
        PetuneError, match="needs bitsandbytes: pip install bitsandbytes"
    ):
        petune.from_pretrained(llama, precision="nf4")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "minilm"])
def test_the_real_models_at_nf4(name):
    model, dense = (
        petune.from_pretrained(name, precision="nf4"),
        petune.from_pretrained(name),
    )
    batch = petune.load_tokenizer(name)(
        "The film was a delight from start to end.", return_tensors="pt"
    )
    with torch.no_grad():
        ours, theirs = (
            each(**batch, output_hidden_states=True).hidden_states[-1]
            for each in (model, dense)
        )
    assert (ours - theirs).norm() / theirs.norm() < 0.6
