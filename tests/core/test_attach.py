"""attach: what is picked, what is refused, and that a refusal changes nothing."""

import pytest
import torch

import petune
from petune.testing import tiny_batch, tiny_model


def test_where_by_role_name_pattern_and_layer():
    model = tiny_model("llama")
    cases = {
        "q v": 6,
        "q_proj": 3,
        "*.mlp.*": 9,
        "q@0": 1,
        "q@1:": 2,
        "q@-1": 1,
        "q@:2 down@-2:": 4,
        "model.layers.1.self_attn.o_proj": 1,
    }
    for where, count in cases.items():
        tuning = petune.attach(model, "lora", where=where)
        assert len(tuning.links) == count, where
        tuning.detach()


def test_fused_projections_are_whole_or_in_parts():
    model = tiny_model("gpt2")
    whole = petune.attach(model, "lora", where="q k v")
    assert {link.site.role for link in whole.links} == {"qkv"}
    whole.detach()
    parts = petune.attach(model, "lora", where="q v")
    assert [link.site.name for link in parts.links[:2]] == [
        f"transformer.h.0.attn.c_attn[{r}]" for r in "qv"
    ]
    assert all(link.site.out_features == 64 for link in parts.links)


def test_a_part_of_a_fused_projection_is_that_part():
    """LoRA on q of GPT-2's c_attn changes the first third of its outputs, by its own update."""
    model = tiny_model("gpt2")
    layer, x = model.transformer.h[0].attn.c_attn, torch.randn(2, 5, 64)
    before = layer(x)
    tuning = petune.attach(model, "lora", where="q@0", rank=4, alpha=8)
    adapter = tuning.links[0].adapter
    torch.nn.init.normal_(adapter.B)
    after = layer(x)
    torch.testing.assert_close(after[..., 64:], before[..., 64:], rtol=0, atol=0)
    torch.testing.assert_close(
        after[..., :64] - before[..., :64],
        2.0 * x @ adapter.A.T @ adapter.B.T,
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "lroa"}, "unknown method 'lroa'. Did you mean 'lora'"),
        (
            {"method": "lora", "rnak": 4},
            "argument of method 'lora': 'rnak'. Did you mean 'rank'",
        ),
        ({"method": "lora", "rank": "many"}, "rank='many'"),
        ({"method": "lora", "where": "qq"}, "unknown role or name 'qq'"),
        ({"method": "lora", "where": "q experts"}, "unknown role or name 'experts'"),
        ({"method": "lora", "where": "q@x"}, "layers are written"),
        (
            {"method": "lora", "where": "attention"},
            "acts on block and embedding and linear sites",
        ),
        ({"method": "lora", "name": "a.b"}, "letters, digits"),
        ({"method": "lora", "train": ["clasifier"]}, "unknown module to train"),
        ({"method": dict}, "neither a method's name nor a class"),
    ],
)
def test_a_mistake_names_the_remedy_and_changes_nothing(arguments, message):
    model = tiny_model("llama")
    keys, flags = (
        list(model.state_dict()),
        [p.requires_grad for p in model.parameters()],
    )
    with pytest.raises(petune.PetuneError, match=message.replace("(", r"\(")):
        petune.attach(model, **arguments)
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == flags
    assert petune.tunings(model) == {}


def test_a_name_is_taken_once():
    model = tiny_model("llama")
    tuning = petune.attach(model, "lora")
    with pytest.raises(petune.PetuneError, match="attached already"):
        petune.attach(model, "ia3")
    tuning.detach()
    with pytest.raises(petune.PetuneError, match="not attached any more"):
        tuning.detach()


def test_a_second_tuning_leaves_the_first_training():
    model = tiny_model("llama")
    one, two = (
        petune.attach(model, "lora", name="one"),
        petune.attach(model, "ia3", name="two"),
    )
    model(**tiny_batch("llama")).loss.backward()
    assert all(p.grad is not None for t in (one, two) for p in t.parameters())


def test_modules_that_train_along_are_the_tunings_own():
    """A classifier trained beside an adapter is switched, saved and detached with it."""
    model, batch = tiny_model("bert"), tiny_batch("bert")
    before = model(**batch).logits
    tuning = petune.attach(model, "lora", train=["classifier"])
    assert "classifier.module.weight" in dict(tuning.state())
    with torch.no_grad():
        tuning.adapters["classifier"].module.bias.add_(1.0)
    torch.testing.assert_close(model(**batch).logits, before + 1)
    with tuning.disabled():
        assert torch.equal(model(**batch).logits, before)
    with petune.route(model, ["default", None]):
        torch.testing.assert_close(
            model(**batch).logits, before + torch.tensor([[1.0], [0.0]])
        )
    tuning.merge()
    torch.testing.assert_close(model(**batch).logits, before + 1)


def test_the_dtype_policy_keeps_a_16_bit_base_16_bit():
    model, batch = tiny_model("llama", "bf16"), tiny_batch("llama")
    for method in (
        "lora",
        "houlsby",
        "ia3",
        "prefix-tuning",
        "prompt-tuning",
        "last-layers",
    ):
        tuning = petune.attach(model, method)
        assert {p.dtype for p in tuning.parameters()} == {torch.float32}
        seen = []
        watch = model.model.layers[-1].self_attn.q_proj.register_forward_hook(
            lambda _m, x, y, seen=seen: seen.extend((*x, y))
        )
        assert model(**batch).logits.dtype == torch.bfloat16
        assert {t.dtype for t in seen} == {torch.bfloat16}, method
        watch.remove()
        tuning.detach()


def test_accelerate_hooks_stay_in_force():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, batch = tiny_model("llama"), tiny_batch("llama")
    for layer in model.model.layers:
        add_hook_to_module(
            layer.self_attn.q_proj, AlignDevicesHook(execution_device="cpu")
        )
    forward = model.model.layers[0].self_attn.q_proj.forward
    before = model(**batch).logits
    tuning = petune.attach(model, "lora", where="q")
    for p in tuning.parameters():
        torch.nn.init.normal_(p, std=0.3)
    assert not torch.allclose(model(**batch).logits, before)
    tuning.detach()
    assert model.model.layers[0].self_attn.q_proj.forward == forward
    assert torch.equal(model(**batch).logits, before)
