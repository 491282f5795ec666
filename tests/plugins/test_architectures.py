"""Every hook point on each architecture by name, through the checks of the coverage table; and the parts of fused
projections.
"""

import pytest
import torch
import transformers

import petune
from petune_bench.coverage import checks, tiny

NAMED = [
    "bert",
    "roberta",
    "xlnet",
    "gpt2",
    "t5",
    "llama",
    "qwen3",
    "gemma3_text",
    "mistral",
    "mixtral",
    "phi3",
    "opt",
]
NAMED += [
    "gpt_neox",
    "bloom",
    "falcon",
    "gptj",
    "deberta-v2",
    "albert",
    "electra",
    "distilbert",
    "bart",
    "mt5",
]
NAMED += ["modernbert", "mamba"]
FUSED = ["bloom", "falcon", "gpt_neox", "phi3", "modernbert", "mpt"]


def built(kind):
    heads = tiny.architectures()[kind]
    head = next(h for h in ("seq2seq-lm", "masked-lm", "causal-lm") if h in heads)
    return tiny.build(kind, head, heads[head])


@pytest.mark.filterwarnings("ignore::petune.errors.PetuneWarning")
@pytest.mark.parametrize("kind", NAMED)
def test_a_method_of_each_hook_point(kind):
    model = built(kind)
    inputs = tiny.batch(model)
    for method in checks.METHODS:
        if (kind, method) == ("mamba", "prefix-tuning"):
            with pytest.raises(petune.UnsupportedError, match="no softmax attention"):
                checks.cell(model, inputs, method)
        else:
            checks.cell(model, inputs, method)


@pytest.mark.parametrize("kind", FUSED)
def test_parts_of_a_fused_projection(kind):
    """What is put onto the part of the values comes out of the attention as the same onto its v."""
    model = built(kind)
    core, fused = (
        next(s for s in petune.sites(model) if s.role == role)
        for role in ("attention", "qkv")
    )
    shift = torch.arange(core.kv_heads * core.value_dim).float()

    class Shift(petune.Adapter):
        where = "v"

        def forward(self, inner, x):
            return inner(x) + self.by

        def __init__(self, site):
            super().__init__()
            self.by = torch.nn.Parameter(shift.clone())

    class Values(petune.Adapter):
        where = "attention"

        def forward(self, inner, q, k, v, mask):
            seen.append(v.detach().clone())
            return inner(q, k, v, mask)

        def __init__(self, site):
            super().__init__()

    seen = []
    inputs = tiny.batch(model)
    petune.attach(model, Values, name="values", where="attention@0")
    checks.output(model, inputs)
    before, seen = seen[0], []
    tuning = petune.attach(model, Shift, name="shift", where="v@0")
    assert [s.name for s in (link.site for link in tuning.links)] == [
        f"{fused.name}[v]"
    ]
    checks.output(model, inputs)
    moved = (seen[0] - before).transpose(1, 2)[0, 0]  # (kv_heads, value_dim)
    torch.testing.assert_close(moved.flatten(), shift, rtol=1e-4, atol=1e-4)


def test_half_of_a_fused_projection():
    model = built("phi3")
    inputs = tiny.batch(model)
    for half, role in enumerate(("gate", "up")):
        tuning = petune.attach(model, "lora", where=role)
        site = tuning.links[0].site
        with torch.no_grad():
            for p in tuning.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        x = torch.randn(2, 3, site.in_features)
        added = site.module(x) - torch.nn.functional.linear(x, site.module.weight)
        assert [bool(rows.abs().max() > 1e-3) for rows in added.chunk(2, -1)] == [
            half == 0,
            half == 1,
        ]
        checks.output(model, inputs)
        tuning.detach()


def test_a_pair_has_the_parts_of_its_halves():
    sizes = {
        "n_embd": 64,
        "n_layer": 1,
        "n_head": 4,
        "vocab_size": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    decoder = transformers.GPT2Config(**sizes)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        tiny.config("bert"), decoder
    )
    sites = petune.sites(transformers.EncoderDecoderModel(config))
    assert [list(s.parts) for s in sites if s.name.endswith("c_attn")] == [
        ["q", "k", "v"],
        ["k", "v"],
    ]
    assert not any(s.parts for s in sites if s.name.startswith("encoder."))
