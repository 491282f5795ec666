"""MLPs on slices of a sequence: the same numbers, and nothing kept of what is inside."""

import pytest
import torch
from shaken import shaken

import petune
from petune.testing import tiny_batch, tiny_model
from petune.training.host_model import checkpoint_blocks
from petune.training.lean import lean
from petune.training.memory import measure_step
from petune.training.tile import mlps


def step(model, tuning, batch):
    torch.manual_seed(0)
    loss = model(**batch).loss
    wanted = [p for p in tuning.parameters() if p.requires_grad]
    return loss.detach(), torch.autograd.grad(loss, wanted, allow_unused=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen", "t5"])
@pytest.mark.parametrize(
    ("method", "options"),
    [("lora", {}), ("houlsby", {}), ("ia3", {}), ("dora", {"where": "up down"}),
     ("lora", {"where": "q"})],
)  # fmt: skip
@pytest.mark.parametrize(
    "checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_equal_to_the_whole_sequence(family, method, options, checkpointing):
    model = tiny_model(family).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # drawn for a slice at a time
    torch.manual_seed(0)
    tuning = shaken(model, method, **options)
    if checkpointing:
        checkpoint_blocks(model)
    batch = tiny_batch(family, rows=3, length=20)
    loss, gradients = step(model, tuning, batch)
    with lean(model, tile=7, labelled_logits=False, packing=False):
        ours, found = step(model, tuning, batch)
    torch.testing.assert_close(ours, loss)
    for one, other in zip(found, gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_dropout_inside_is_drawn_again_as_it_was():
    model = tiny_model("llama").train()
    tuning = shaken(model, "lora", dropout=0.3)
    batch = tiny_batch("llama", rows=2, length=20)
    with lean(model, tile=8):
        loss, gradients = step(model, tuning, batch)
        step_size = 1e-3
        with torch.no_grad():
            for p, g in zip(tuning.parameters(), gradients, strict=True):
                p.sub_(step_size * g)
        lower, _ = step(model, tuning, batch)
    drop = step_size * sum(float((g * g).sum()) for g in gradients)
    assert float(loss - lower) == pytest.approx(drop, rel=0.05)


def test_what_is_inside_is_not_kept():
    config = petune.testing.tiny_model("llama").config
    config.intermediate_size, config.num_hidden_layers = 2048, 2
    torch.manual_seed(0)
    model = type(tiny_model("llama"))(config).train()
    tuning = petune.attach(model, "lora")
    batch = tiny_batch("llama", rows=1, length=60, padding=0)
    kept = {}
    for name, savings in (("plain", {}), ("tiled", {"tile": 16})):
        with lean(model, **savings):
            optimizer = torch.optim.SGD(list(tuning.parameters()))
            kept[name] = measure_step(model, optimizer, lambda: model(**batch).loss, batch.values())  # fmt: skip
    inside = 2 * 2 * 60 * 2048 * 4  # gate and up of both layers
    assert kept["plain"][1] - kept["tiled"][1] > 0.95 * inside


def test_who_has_slices():
    assert (
        len(mlps(tiny_model("llama"))) == tiny_model("llama").config.num_hidden_layers
    )
    with (
        pytest.raises(petune.PetuneError, match=r"training\.tile: no MLP"),
        lean(tiny_model("bert"), tile=8),
    ):
        pass


def test_methods_by_position_and_routes_keep_whole_rows():
    model = tiny_model("llama").train()
    tuning = shaken(model, "loreft")
    batch = tiny_batch("llama", rows=2, length=20)
    loss, gradients = step(model, tuning, batch)
    with lean(model, tile=4, packing=False):
        ours, found = step(model, tuning, batch)
    torch.testing.assert_close(ours, loss)
    torch.testing.assert_close(found, gradients)
    shaken(model, "lora", name="other")
    ids = {k: v for k, v in batch.items() if k != "labels"}
    with petune.route(model, ["default", "other"]):
        plain = model(**ids).logits
        with pytest.raises(petune.UnsupportedError, match="enter lean"), lean(model):
            pass
    with lean(model, tile=4), petune.route(model, ["default", "other"]):
        assert torch.equal(model(**ids).logits, plain)
