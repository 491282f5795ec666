"""Discovery: what a model of each family is found to consist of."""

from collections import Counter

import pytest
import torch
import transformers

import petune
from petune.testing import tiny_model
from petune_bench.coverage import tiny

LINEAR = {
    "llama": "q k v o gate up down",
    "qwen": "q k v o gate up down",
    "gpt2": "qkv o up down",
    "bert": "q k v o up down",
    "roberta": "q k v o up down",
}


@pytest.mark.parametrize("family", LINEAR)
def test_every_block_has_its_linear_layers_by_role(family):
    sites = petune.sites(tiny_model(family))
    found = Counter(s.role for s in sites if s.kind == "linear" and s.layer is not None)
    assert found == dict.fromkeys(LINEAR[family].split(), 3)
    assert Counter(s.role for s in sites if s.kind == "attention") == {"attention": 3}
    assert Counter(s.role for s in sites if s.kind == "block")["layer"] == 3
    assert [s.role for s in sites if s.kind in ("prompt", "embedding")] == [
        "prompt",
        "embed",
    ]


def test_encoder_decoder():
    sites = petune.sites(tiny_model("t5"))
    assert Counter(s.role for s in sites if s.kind == "attention") == {
        "attention": 6,
        "cross-attention": 3,
    }
    assert Counter(s.role for s in sites if s.kind == "linear" and s.layer is not None) == {
        "q": 9, "k": 9, "v": 9, "o": 9, "up": 6, "down": 6,
    }  # fmt: skip
    assert {s.layer for s in sites if s.role == "layer"} == {0, 1, 2}
    assert [s.name for s in sites if s.role == "embed"] == [
        "encoder.embed_tokens",
        "decoder.embed_tokens",
    ]


def test_sizes():
    sites = {s.name: s for s in petune.sites(tiny_model("llama"))}
    k = sites["model.layers.0.self_attn.k_proj"]
    assert (k.in_features, k.out_features, k.layer) == (64, 32, 0)
    attention = sites["model.layers.2.self_attn#attention"]
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (4, 2, 16)


def test_a_new_head_is_a_site_of_its_own():
    sites = petune.sites(tiny_model("bert"))
    assert [s.name for s in sites if s.role == "classifier"] == ["classifier"]


def test_adapters_are_no_sites():
    model = tiny_model("llama")
    before = [s.name for s in petune.sites(model)]
    petune.attach(model, "houlsby")
    petune.attach(model, "prompt-tuning", name="prompt")
    assert [s.name for s in petune.sites(model)] == before


def test_weights_are_read_off_any_layer():
    for family, precision in (
        ("llama", "fp32"),
        ("gpt2", "fp32"),
        ("llama", "nf4"),
        ("llama", "int8"),
    ):
        exact = {s.name: s for s in petune.sites(tiny_model(family))}
        for site in petune.sites(tiny_model(family, precision)):
            if site.kind != "linear" or site.role == "head":
                continue
            weight, module = site.weight(), exact[site.name].module
            assert weight.shape == (site.out_features, site.in_features)
            dense = (module.weight.T if family == "gpt2" else module.weight).detach()
            error = float((weight - dense).abs().max() / dense.abs().max())
            assert error < {"fp32": 1e-6, "nf4": 0.2, "int8": 0.02}[precision], (
                site.name,
                precision,
            )


def small(kind, **more):
    """A model of an architecture as the coverage table builds it, on no device."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(tiny.config(kind), **more)


def test_a_mixture_of_experts_is_one_mlp():
    sites = petune.sites(small("mixtral"))
    assert [s.name for s in sites if s.role == "mlp"] == [
        "model.layers.0.mlp#mlp",
        "model.layers.1.mlp#mlp",
    ]
    shared = petune.sites(small("qwen2_moe"))  # a dense MLP beside the experts
    assert [s.name for s in shared if s.role == "mlp"] == [
        "model.layers.0.mlp#mlp",
        "model.layers.1.mlp#mlp",
    ]
    assert Counter(s.role for s in shared if "shared_expert." in s.name) == {
        "gate": 2,
        "up": 2,
        "down": 2,
    }


def test_values_may_be_narrower_than_keys():
    core = next(s for s in petune.sites(small("deepseek_v3")) if s.kind == "attention")
    assert (core.heads, core.kv_heads, core.head_dim, core.value_dim) == (4, 4, 32, 16)


def test_what_stands_beside_an_attention_is_none_of_its_projections():
    sites = petune.sites(small("deepseek_v32"))
    assert {s.role for s in sites if ".indexer." in s.name and s.kind == "linear"} == {
        "other"
    }
    grouped = petune.sites(small("deepseek_v4"))
    assert not [s for s in grouped if s.name.endswith("o_a_proj")], (
        "a linear layer by groups is no linear layer"
    )


def test_blocks_in_lists_of_lists():
    with torch.device("meta"):
        model = transformers.AutoModelForMaskedLM.from_config(tiny.config("funnel"))
    layers = [
        s.name for s in petune.sites(model) if s.role == "layer" and "encoder" in s.name
    ]
    assert layers[0] == "funnel.encoder.blocks.0.0"
    assert len(layers) == sum(len(block) for block in model.funnel.encoder.blocks)


def test_towers_have_the_geometry_of_their_own():
    cores = [s for s in petune.sites(small("gemma3")) if s.kind == "attention"]
    assert {s.name.split(".")[1] for s in cores} == {"vision_tower", "language_model"}
    assert {(s.heads, s.kv_heads) for s in cores if "vision" in s.name} == {(4, 4)}
    assert {(s.heads, s.kv_heads) for s in cores if "language" in s.name} == {(4, 2)}


def test_a_module_without_python_code_is_none_of_the_attentions():
    model = tiny_model("llama")
    plain = [(s.name, s.role) for s in petune.sites(model)]
    model.model.layers[0].gate = torch.jit.trace(torch.nn.Tanh(), torch.zeros(1))
    assert [(s.name, s.role) for s in petune.sites(model)] == plain
