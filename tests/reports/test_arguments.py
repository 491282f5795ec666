"""Arguments of the Python functions that are of another kind than they take: one line, and the model as it was."""

import pytest
import torch
from torch import nn

import petune
from petune.testing import tiny_model

NAN = float("nan")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"where": ["q", "v"]}, r"^where=\['q', 'v'\]: should be one text, such as"),
        ({"where": []}, r"^where=\[\]: should be one text"),
        ({"where": 3}, "^where=3: should be one text"),
        ({"name": 3}, "^name=3: should be a text"),
        ({"name": None}, "^name=None: should be a text"),
        ({"train": "lm_head"}, "^train='lm_head': give a list of modules' names"),
        ({"train": 3}, "^train=3: give a list"),
        ({"alpha": NAN}, "^method 'lora': alpha: nan should be a finite number"),
        ({"alpha": -float("inf")}, "alpha: -inf should be a finite number"),
        ({"alpha_pattern": {"q": NAN}}, r"alpha_pattern\.q: nan should be a finite"),
    ],
)
def test_what_attach_can_not_take(given, words):
    model = tiny_model("llama")
    with pytest.raises(petune.PetuneError, match=words) as caught:
        petune.attach(model, "lora", **given)
    assert "\n" not in str(caught.value)
    assert petune.tunings(model) == {}
    assert all(p.requires_grad for p in model.parameters())


def test_several_methods_and_their_sites():
    with pytest.raises(petune.PetuneError, match=r"where=\['q'\]: should be one text"):
        petune.attach(tiny_model("llama"), ["lora", "ia3"], where={"lora": ["q"]})


@pytest.mark.parametrize("model", [None, "m", object(), nn.Linear(2, 2)])
def test_what_is_no_model(model, tmp_path):
    petune.attach(tiny_model("llama"), "lora").save(tmp_path)
    for use in (petune.attach, petune.load):
        what = "lora" if use is petune.attach else tmp_path
        with pytest.raises(petune.UnsupportedError, match=r"is no transformers model"):
            use(model, what)


@pytest.mark.parametrize("names", ["default", None, 3, {"default"}])
def test_what_is_no_route(names):
    model = tiny_model("llama")
    petune.attach(model, "lora")
    with (
        pytest.raises(petune.PetuneError, match="is no list of names; give a list"),
        petune.route(model, names),
    ):
        model(torch.ones(1, 3, dtype=torch.long))
    assert model(torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, 128)


@pytest.mark.parametrize("weight", [1e39, -1e39, 10**400, NAN, "1", None])
def test_what_is_no_weight(weight):
    tuning = petune.attach(tiny_model("llama"), "lora")
    with pytest.raises(petune.PetuneError, match="wanted is a finite number"):
        tuning.weight = weight
    assert tuning.weight == 1
