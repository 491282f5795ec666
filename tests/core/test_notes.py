"""What a tuning's sites tell each other within a forward, and hyperparameters by site."""

import pytest
import torch
from torch import nn

import petune
from petune.testing import tiny_batch, tiny_model

OPTIONS = {
    "max_new_tokens": 4,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
}


class Counting(petune.Adapter):
    """Notes its site, and remembers how many had done so before."""

    where = "layer"

    def __init__(self, site, *, start: float = 0.0):
        super().__init__()
        self.delta = nn.Parameter(torch.full((site.out_features,), start))
        self.seen = site.shared("seen", list)

    def forward(self, inner, x, *, notes):
        self.seen.append(len(notes))
        notes[self] = x
        return inner(x) + self.delta


@pytest.mark.parametrize("use_cache", [True, False])
def test_notes_are_empty_when_a_forward_begins(use_cache):
    model = tiny_model("llama")
    tuning = petune.attach(model, Counting)
    seen = tuning.links[0].adapter.seen
    model(**tiny_batch("llama"))
    assert seen == [0, 1, 2]
    seen.clear()
    model.generate(torch.tensor([[11, 12, 13]]), use_cache=use_cache, **OPTIONS)
    assert seen == [0, 1, 2] * 4


def test_tunings_have_notes_of_their_own():
    model = tiny_model("llama")
    one = petune.attach(model, Counting, name="one")
    two = petune.attach(model, Counting, name="two")
    model(**tiny_batch("llama"))
    assert one.links[0].adapter.seen == two.links[0].adapter.seen == [0, 1, 2]


def test_every_hyperparameter_may_differ_by_site():
    model = tiny_model("llama")
    tuning = petune.attach(
        model, "houlsby", width=8, width_pattern={"attn@0": 4, "attn": 6}
    )
    widths = {
        name: adapter.down.out_features for name, adapter in tuning.adapters.items()
    }
    assert sorted(widths.values()) == [4, 6, 6, 8, 8, 8]
    (narrow,) = [name for name, width in widths.items() if width == 4]
    assert narrow.startswith("model.layers.0.")


def test_the_patterns_are_saved(tmp_path):
    model, batch = tiny_model("llama"), tiny_batch("llama")
    petune.attach(model, Counting, start=1.0, start_pattern={"layer@1": 2.0}).save(
        tmp_path
    )
    again = tiny_model("llama")
    loaded = petune.load(again, tmp_path, method=Counting)
    assert [float(a.delta[0]) for a in loaded.adapters.values()] == [1.0, 2.0, 1.0]
    assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    ("method", "arguments", "words"),
    [
        ("lora", {"rank_pattern": {"q": "many"}}, "rank_pattern"),
        ("lora", {"rank_pattern": {"q": 0}}, "greater than 0"),
        ("lora", {"rank_pattern": 3}, "rank_pattern=3"),
        (
            "lora",
            {"rank_pattern": {"experts": 2}},
            "'experts' matches none of the sites",
        ),
        ("lora", {"ranks_pattern": {"q": 2}}, "unknown argument"),
        ("last-layers", {"layers_pattern": {"q": 2}}, "unknown argument"),
    ],
)
def test_a_pattern_that_can_not_be_is_named(method, arguments, words):
    model = tiny_model("llama")
    with pytest.raises(petune.PetuneError, match=words):
        petune.attach(model, method, **arguments)
    assert not petune.tunings(model)
