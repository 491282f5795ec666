"""A role is what a layer computes: `where="q v"` adapts queries and values on every architecture."""

import re

import pytest
import torch
from torch import nn

import petune
from petune.core.frozen import attentions
from petune_bench.coverage import checks, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*degrees of freedom")
BERT = {"attention.self.query": "q", "attention.self.key": "k"}
BERT |= {"attention.self.value": "v", "attention.output.dense": "o"}
BERT_MLP = {r"layer.\d.intermediate.dense": "up", r"layer.\d.output.dense": "down"}
XLM = {"q_lin": "q", "k_lin": "k", "v_lin": "v", "out_lin": "o"}
LINEAR_ATTENTION = {"linear_attn.in_proj_z": "other", "linear_attn.in_proj_a": "other"}
KNOWN = {
    "big_bird": BERT,
    "roformer": BERT,
    "tapas": BERT,
    "mra": BERT,
    "yoso": BERT,
    "xmod": BERT | BERT_MLP,
    "mobilebert": BERT_MLP,
    "xlm": XLM,
    "flaubert": XLM,
    "longt5": dict.fromkeys(["LocalSelfAttention.q", "SelfAttention.q"], "q")
    | dict.fromkeys(["LocalSelfAttention.v", "SelfAttention.v"], "v")
    | {"LocalSelfAttention.k": "k", "LocalSelfAttention.o": "o"},
    "zaya": {"qkv_proj.q_proj": "q", "qkv_proj.k_proj": "k", "o_proj": "o"},
    "qwen3_5": LINEAR_ATTENTION | {"linear_attn.in_proj_qkv": "qkv"},
    "qwen3_next": {
        "linear_attn.in_proj_qkvz": "qkv",
        "linear_attn.in_proj_ba": "other",
    },
    "xlstm": {
        "mlstm_layer.q": "q",
        "mlstm_layer.v": "v",
        "mlstm_layer.out_proj": "o",
        "mlstm_layer.ogate_preact": "other",
    },
    "rwkv": {
        "attention.receptance": "q",
        "attention.key": "k",
        "feed_forward.key": "up",
    },
    "cpmant": {"w_in.w_0": "gate", "w_in.w_1": "up", "ffn.w_out": "down"},
    "lxmert": {
        "lang_inter.dense": "up",
        "lang_output.dense": "down",
        "visn_inter.dense": "up",
        "visn_output.dense": "down",
    },
    "zamba2": {"mamba.in_proj": "up", "mamba.out_proj": "down"},
    "deberta": {"self.in_proj": "qkv"},
    "deepseek_v4": {"compressor.kv_proj": "other", "self_attn.kv_proj": "kv"},
}
BY_NAME_ALONE = ["bert", "big_bird", "roformer", "tapas", "xlm", "flaubert", "t5"]
BY_NAME_ALONE += ["llama", "gpt2", "falcon", "mpt", "deberta", "distilbert", "opt"]
MIXED = {"zaya"}
"""Architectures whose queries are made of keys too, by a convolution over both."""
WATCHED = ["big_bird", "roformer", "tapas", "xlm", "longt5", "flaubert", "bert"]
WATCHED += ["deberta-v2", "qwen3_5", "qwen3_next", "gpt_neo", "t5", "albert"]


def built(kind):
    heads = tiny.architectures()[kind]
    wanted = ("seq2seq-lm", "masked-lm", "causal-lm", *heads)
    head = next(h for h in wanted if h in heads)
    return tiny.build(kind, head, heads[head])


def roles(model):
    return {s.name: s.role for s in petune.sites(model) if s.kind == "linear"}


@pytest.mark.parametrize("kind", KNOWN)
def test_roles_of_layers_that_names_or_sizes_alone_confuse(kind):
    found = roles(built(kind))
    for end, role in KNOWN[kind].items():
        named = {n: r for n, r in found.items() if re.search(rf"\.{end}$", n)}
        assert named, end
        assert set(named.values()) == {role}, named


@pytest.mark.parametrize("kind", BY_NAME_ALONE)
def test_names_tell_the_roles_of_an_attention_that_is_not_recognized(kind, monkeypatch):
    model = built(kind)
    recognized = roles(model)
    for name in ("calls_attention_interface", "computes_attention"):
        monkeypatch.setattr(attentions, name, lambda cls: False)
    assert roles(model) == recognized


class Noise(petune.Adapter):
    """Another output for every input."""

    where = "q"

    def __init__(self, site):
        super().__init__()
        self.by = nn.Parameter(torch.randn(site.out_features))

    def forward(self, inner, x):
        return inner(x) + self.by * (1 + x.sum(-1, keepdim=True).tanh())


class Watch(petune.Adapter):
    """What comes to an attention first: some models run a layer again with what it gave."""

    where = "attention"

    def __init__(self, site):
        super().__init__()
        self.seen = None

    def forward(self, inner, q, k, v, mask):
        self.seen = self.seen or dict(zip("qkv", (q, k, v), strict=True))
        return inner(q, k, v, mask)


def seen(link, model, inputs):
    link.adapter.seen = None
    checks.output(model, inputs)
    return link.adapter.seen


def check_by_value(model):
    """What is put on a layer of a role q, k or v changes that of the attention, and no other."""
    inputs = tiny.batch(model)
    watch = petune.attach(model, Watch, name="watch")
    for link in watch.links:
        for role in "qkv":
            core = link.site.module_name
            ends = [n for n, r in roles(model).items() if r == role and core in n]
            if not ends:
                continue
            before = seen(link, model, inputs)
            noise = petune.attach(model, Noise, name="noise", where=" ".join(ends))
            after = seen(link, model, inputs)
            noise.detach()
            if before is None:
                continue
            changed = {x for x in "qkv" if not torch.equal(before[x], after[x])}
            assert changed == {role}, (core, role, changed)
    watch.detach()


@pytest.mark.parametrize("kind", WATCHED)
def test_what_is_put_on_a_role_reaches_that_of_the_attention(kind):
    check_by_value(built(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(tiny.architectures().keys() - MIXED))
def test_every_architecture_by_value(kind):
    try:
        model = built(kind)
        checks.repeatable(model, tiny.batch(model))
    except Exception as error:
        pytest.skip(f"not built: {error}"[:80])
    try:
        check_by_value(model)
    except petune.UnsupportedError as none:
        pytest.skip(str(none)[:80])
