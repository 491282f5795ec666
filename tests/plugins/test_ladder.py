"""Methods that train beside or above the base let no gradient into what is below them, and pay for none."""

import pytest
import torch
from torch import nn

import petune
from petune.testing import tiny_batch, tiny_model
from petune.training.memory import measure_step


def saved_bytes(method, family="llama", **arguments):
    """What autograd keeps of one forward."""
    model = tiny_model(family).train()
    tuning = petune.attach(model, method, **arguments)
    batch = tiny_batch(family, rows=4, length=64, padding=0)
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
    return measure_step(model, optimizer, lambda: model(**batch).loss)[1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_no_gradient_enters_the_blocks(family):
    for method in ("ladder-side-tuning", "last-layers"):
        model = tiny_model(family)
        petune.attach(model, method)
        model.enable_input_require_grads()
        seen = []

        def watch(module, args, out, seen=seen):
            seen.append((out[0] if isinstance(out, tuple) else out).requires_grad)

        for site in petune.sites(model):
            if site.role == "layer":
                site.module.register_forward_hook(watch)
        if method == "last-layers":
            model.disable_input_require_grads()
        model(**tiny_batch(family)).loss.backward()
        assert seen == [False, False, True], method


def test_what_backward_keeps():
    """A ladder keeps the blocks' results and a thin network, the last layer itself: lora all of every block."""
    full = saved_bytes("lora")
    assert saved_bytes("ladder-side-tuning") < 0.4 * full
    assert saved_bytes("last-layers") < 0.5 * full
    assert saved_bytes("ladder-side-tuning", "bert") < 0.4 * saved_bytes("lora", "bert")


@torch.no_grad()
def test_the_ladder_is_its_formula():
    model = tiny_model("bert")
    rungs = [
        link.adapter
        for link in petune.attach(model, "ladder-side-tuning", reduction=4).links
    ]
    for rung in rungs:
        for p in rung.parameters():
            nn.init.normal_(p, std=0.3)
    results = []
    layers = model.bert.encoder.layer
    hooks = [
        layer.register_forward_hook(lambda module, args, out: results.append(out))
        for layer in layers
    ]
    batch = tiny_batch("bert")
    model(**batch)
    for hook in hooks:
        hook.remove()
    petune.tunings(model)["default"].detach()
    base = model.bert(
        batch["input_ids"], batch["attention_mask"], output_hidden_states=True
    ).hidden_states[1:]
    side = 0.0
    for rung, h in zip(rungs, base, strict=True):
        gate = torch.sigmoid(rung.gate)
        mixed = gate * (h @ rung.down.weight.T + rung.down.bias) + (1 - gate) * side
        inside = nn.functional.gelu(mixed @ rung.mlp[0].weight.T + rung.mlp[0].bias)
        side = mixed + inside @ rung.mlp[2].weight.T + rung.mlp[2].bias
    torch.testing.assert_close(
        results[-1], base[-1] + side @ rungs[-1].up.weight.T, rtol=1e-4, atol=1e-4
    )


def test_one_beside_a_decoder():
    tuning = petune.attach(tiny_model("t5"), "ladder-side-tuning")
    assert {key.split(".")[0] for key, _ in tuning.state()} == {"decoder"}
