"""Recomputed norms and activations, compiled blocks and lower blocks without a graph: same numbers, fewer bytes."""

from functools import partial

import pytest
import torch
from shaken import shaken

import petune
from petune.testing import tiny_batch, tiny_model
from petune.training.host_model import checkpoint_blocks, plain_input
from petune.training.lean import lean
from petune.training.memory import measure_step
from petune.training.recompute import forward
from petune.training.regions import compiled


def step(model, tuning, batch, seed=0):
    """(loss, gradients, bytes kept for backward)."""
    found = {}

    def loss():
        torch.manual_seed(seed)
        told = {} if model.config.model_type == "bert" else {"use_cache": False}
        found["loss"] = model(**batch, **told).loss
        return found["loss"]

    parameters = [p for p in tuning.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    found.clear()
    _, kept = measure_step(model, torch.optim.SGD(parameters), loss, batch.values())
    return found["loss"].detach(), gradients, kept


def adapted(family, method="lora", precision="fp32", **options):
    model = tiny_model(family, precision).train()
    torch.manual_seed(0)
    return model, shaken(model, method, **options)


@pytest.mark.parametrize("family", ["llama", "qwen", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "method",
    [
        "lora",
        "houlsby",
        pytest.param("ln-tuning", marks=pytest.mark.slow),
        pytest.param("ia3", marks=pytest.mark.slow),
    ],
)
def test_recomputed_values_are_the_same_to_the_last_bit(
    family, precision, method, monkeypatch
):
    """Dropout included: what a dropout has drawn is what backward gets."""
    monkeypatch.setattr(forward, "LEAST", 0)
    model, tuning = adapted(family, method, precision)
    batch = tiny_batch(family, rows=4, length=32)
    loss, gradients, more = step(model, tuning, batch)
    with lean(model, labelled_logits=False, packing=False):
        ours, found, less = step(model, tuning, batch)
    assert torch.equal(ours, loss)
    for one, other in zip(found, gradients, strict=True):
        assert torch.equal(one, other)
    assert less < (0.9 if family == "t5" else 0.75) * more
    assert step(model, tuning, batch)[2] == more


@pytest.mark.parametrize(
    "family", ["llama", pytest.param("bert", marks=pytest.mark.slow)]
)
def test_compiled_blocks(family, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model, tuning = adapted(family)
    batches = [
        tiny_batch(family, rows=rows, length=length)
        for rows, length in ((2, 10), (3, 12))
    ]
    want = [step(model, tuning, batch) for batch in batches]
    with compiled(model):
        got = [step(model, tuning, batch) for batch in batches]
        model.eval()
        with torch.no_grad():
            model(**batches[0])
    assert not [m for m in model.modules() if "forward" in vars(m)]
    for (loss, gradients, _), (ours, found, _) in zip(want, got, strict=True):
        torch.testing.assert_close(ours, loss)
        for one, other in zip(found, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_without_a_compiler():
    missing = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with (
        missing,
        pytest.raises(petune.PetuneError, match="no C\\+\\+ compiler"),
        compiled(tiny_model("llama")),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "dropout"), [("fp32", 0.0), ("bf16", 0.1), ("nf4", 0.0)]
)
def test_compiled_blocks_keep_less(precision, dropout):
    model, tuning = adapted("llama", precision=precision, dropout=dropout)
    batch = tiny_batch("llama", rows=4, length=32)
    loss, gradients, more = step(model, tuning, batch)
    with compiled(model):
        step(model, tuning, batch)
        ours, found, less = step(model, tuning, batch)
    assert less < 0.7 * more
    if not dropout:
        torch.testing.assert_close(
            ours, loss, rtol=1e-2 if precision == "bf16" else 1e-4, atol=0
        )
        for one, other in zip(found, gradients, strict=True):
            close = 5e-2 if precision == "bf16" else 1e-3
            torch.testing.assert_close(
                one, other, rtol=close, atol=close * float(other.abs().max())
            )


@pytest.mark.parametrize(
    ("method", "options", "share"),
    [
        ("lora", {"where": "q@-1: v@-1:"}, 0.6),
        ("last-layers", {}, 0.6),
        ("ladder-side-tuning", {}, 0.75),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_lies_below_the_adapters_has_no_graph(
    method, options, share, checkpointing
):
    model, tuning = adapted("llama", method, **options)
    reached = []
    for block in model.model.layers[:-1]:
        mlp = (
            block.mlp
        )  # what a block adds to the stream, whatever an adapter taps from it
        mlp.register_forward_hook(
            lambda *given: reached.append(given[-1].requires_grad)
        )
    if checkpointing:
        with plain_input(model):
            checkpoint_blocks(model)
    batch = {
        k: v for k, v in tiny_batch("llama", rows=4, length=32).items() if k != "labels"
    }
    assert model(**batch, use_cache=False).logits.requires_grad
    assert not any(reached)
    assert len(reached) == len(model.model.layers) - 1
    if not checkpointing:
        every, everywhere = adapted("llama")
        whole = step(every, everywhere, tiny_batch("llama", rows=4, length=32))[2]
        part = step(model, tuning, tiny_batch("llama", rows=4, length=32))[2]
        assert part < share * whole


def test_numbers_that_are_read_as_complex_ones():
    """As the rotations of Llama 4 and DeepSeek are."""
    torch.manual_seed(0)
    x = torch.randn(64, 2, requires_grad=True)
    turn = torch.polar(torch.ones(64), torch.arange(64.0))

    def loss():
        pairs = torch.view_as_complex(x.sigmoid() * 2) * turn
        turned = torch.view_as_real(pairs.conj() * pairs.exp()).square()
        return (turned * turned.sin()).sum()

    (wanted,) = torch.autograd.grad(loss(), x)
    with forward.watched(0):
        ours = loss()
    (found,) = torch.autograd.grad(ours, x)
    assert torch.equal(found, wanted)
