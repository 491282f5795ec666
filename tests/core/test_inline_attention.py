"""Attention that a model computes itself, however it writes it, is the same with a prefix as with a cache of it."""

import pytest
import torch
from shaken import cache_of

import petune
from petune_bench.coverage import checks, tiny


def prefixed(kind, **more):
    model = tiny.build(kind, "causal-lm", tiny.architectures()[kind]["causal-lm"])
    torch.manual_seed(0)
    tuning = petune.attach(model, "prefix-tuning", length=4, **more)
    with torch.no_grad():
        for p in tuning.parameters():
            p.normal_(std=0.5)
    return model, tuning


@pytest.mark.parametrize(
    "kind", ["gptj", "codegen", "falcon", "gpt_neox_japanese", "openai-gpt", "xglm"]
)
@torch.no_grad()
def test_a_prefix_is_what_a_cache_of_it_is(kind):
    """scale before, scale after, baddbmm, a mask by multiplication, torch's own function."""
    model, tuning = prefixed(kind)
    ids = tiny.batch(model)["input_ids"]
    positions = torch.arange(ids.shape[1])[None].expand(len(ids), -1)
    got = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    if kind == "openai-gpt":  # it has no cache: what a value adds has to come out
        with tuning.disabled():
            assert not torch.allclose(
                got, model(input_ids=ids, position_ids=positions).logits, atol=1e-3
            )
        return
    cache = cache_of(tuning, len(ids))
    with tuning.disabled():
        want = model(
            input_ids=ids, position_ids=positions, past_key_values=cache
        ).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kind",
    ["bloom", "mpt", "deberta", "deberta-v2", "xlnet", "gpt_neo", "lxmert", "mpnet"],
)
@torch.no_grad()
def test_scores_keep_what_the_model_adds_to_them(kind):
    """ALiBi, relative positions, buckets, windows, masks: an adapter that adds nothing gives the base."""
    seen = []

    class Through(petune.Adapter):
        where = "attention"

        def __init__(self, site):
            super().__init__()

        def forward(self, inner, q, k, v, mask):
            seen.append((q.shape[1:2], k.shape[2], v.shape[3]))
            return inner(q, torch.cat([k[:, :, :0], k], 2), v, mask)

    heads = tiny.architectures()[kind]
    model = tiny.build(kind, next(iter(heads)), next(iter(heads.values())))
    inputs = tiny.batch(model) | {
        "attention_mask": torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
    }
    base = checks.output(model, inputs)
    tuning = petune.attach(model, Through)
    torch.testing.assert_close(checks.output(model, inputs), base, rtol=1e-4, atol=1e-4)
    assert len(seen) >= 2
    tuning.detach()
    assert all(
        "_attn" not in vars(m) and "rel_attn_core" not in vars(m)
        for m in model.modules()
    )


@torch.no_grad()
def test_rows_are_routed():
    model, _ = prefixed("gptj", name="one")
    petune.attach(model, "prefix-tuning", length=2, name="two")
    ids = tiny.batch(model)["input_ids"]
    with petune.route(model, ["one", "two"]):
        both = model(input_ids=ids).logits
    for i, name in enumerate(["one", "two"]):
        with petune.route(model, [name]):
            alone = model(input_ids=ids[i : i + 1]).logits
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_what_can_not_be_observed_is_refused():
    model = tiny.build("longformer", "masked-lm", "LongformerForMaskedLM")
    petune.attach(model, "prefix-tuning")
    with pytest.raises(petune.UnsupportedError, match="LongformerSelfAttention"):
        checks.output(model, tiny.batch(model))
