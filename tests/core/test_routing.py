"""A batch whose rows go through different methods equals the single runs."""

import pytest
import torch
from shaken import shaken

import petune
from petune.testing import tiny_batch, tiny_model
from petune.testing.behaviours import GENERATION

ROWS = ["lora", "prefix", "prompt", "long", "houlsby", None]


@pytest.fixture(params=["llama", "gpt2", "bert", "t5", "qwen", "roberta"])
def served(request):
    """A model with five tunings of four methods, prompts of two lengths among them."""
    model = tiny_model(request.param)
    shaken(model, "lora", "lora")
    shaken(model, "prefix-tuning", "prefix", length=4)
    shaken(model, "prompt-tuning", "prompt", length=3)
    shaken(model, "prompt-tuning", "long", length=7)
    shaken(model, "houlsby", "houlsby")
    return request.param, model


def only(model, name):
    for tuning in petune.tunings(model).values():
        tuning.enabled = tuning.name == name


def run(family, model, batch):
    with torch.no_grad():
        out = model(
            **{k: v for k, v in batch.items() if k != "labels" or family == "t5"}
        ).logits
    return [
        row if out.dim() == 2 or family == "t5" else row[m.bool()]
        for row, m in zip(out, batch["attention_mask"], strict=True)
    ]


def test_forward(served):
    family, model = served
    batch = tiny_batch(family, rows=len(ROWS))
    want = []
    for i, name in enumerate(ROWS):
        only(model, name)
        want.append(run(family, model, batch)[i])
    with petune.route(model, ROWS):
        got = run(family, model, batch)
    for name, one, other in zip(ROWS, got, want, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()), msg=str(name)
        )
    for i in range(len(ROWS) - 1):
        assert not torch.allclose(got[i], got[-1][: len(got[i])], atol=1e-3) or len(
            got[i]
        ) != len(got[-1])


def test_generation(served):
    family, model = served
    if family in ("bert", "roberta"):
        assert not model.can_generate()
        return
    batch = {
        k: v for k, v in tiny_batch(family, rows=len(ROWS)).items() if k != "labels"
    }
    if family != "t5":
        batch = {k: v.flip(1) for k, v in batch.items()}
    want = []
    for i, name in enumerate(ROWS):
        only(model, name)
        want.append(model.generate(**batch, **GENERATION)[i])
    with petune.route(model, ROWS):
        assert torch.equal(model.generate(**batch, **GENERATION), torch.stack(want))
        assert torch.equal(
            model.generate(**batch, use_cache=False, **GENERATION), torch.stack(want)
        )
        beams = model.generate(**batch, num_beams=2, **GENERATION)
    assert beams.shape == torch.stack(want).shape


def test_only_the_tunings_of_a_batch_get_gradients(served):
    family, model = served
    batch = tiny_batch(family, rows=2)
    with petune.route(model, ["lora", None]):
        model.train()(**batch).loss.backward()
    reached = {
        n: any(p.grad is not None for p in t.parameters())
        for n, t in petune.tunings(model).items()
    }
    assert reached == {
        "lora": True,
        "prefix": False,
        "prompt": False,
        "long": False,
        "houlsby": False,
    }


def test_mistakes(served):
    family, model = served
    batch = {
        k: v
        for k, v in tiny_batch(family, rows=2).items()
        if k != "labels" or family == "t5"
    }
    with (
        pytest.raises(petune.PetuneError, match=r"'lroa'.*Did you mean 'lora'"),
        petune.route(model, ["lroa"]),
    ):
        pass
    with (
        pytest.raises(petune.PetuneError, match="3 names for a batch of 2 rows"),
        petune.route(model, ["lora"] * 3),
    ):
        model(**batch)
    with pytest.raises(petune.PetuneError, match="no names"), petune.route(model, []):
        pass
    before = run(family, model, tiny_batch(family))
    with pytest.raises(RuntimeError, match="inside"), petune.route(model, [None]):
        raise RuntimeError("inside")
    for one, other in zip(run(family, model, tiny_batch(family)), before, strict=True):
        assert torch.equal(one, other)


def test_a_base_without_tunings_can_be_routed():
    model = tiny_model("llama")
    batch = tiny_batch("llama")
    before = run("llama", model, batch)
    with petune.route(model, [None, None]):
        assert all(
            torch.equal(a, b)
            for a, b in zip(run("llama", model, batch), before, strict=True)
        )
