"""What adapters are told of the batch: which columns are the prompt's, whatever else is in it."""

import pytest
import torch
import transformers
from packaging.version import Version
from shaken import checkpoints, shaken
from torch import nn

import petune
from petune.testing import tiny_batch, tiny_model


class Spy(petune.Adapter):
    """Adds nothing and keeps what it was told."""

    where = "layer"

    def __init__(self, site):
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(site.out_features))
        self.seen = []

    def forward(self, inner, x, *, batch):
        y = inner(x)
        assert batch.place.shape == y.shape[:2]
        self.seen.append(batch)
        return y + self.delta


def watched(family, where="layer@0"):
    model = tiny_model(family)
    tuning = petune.attach(model, Spy, name="spy", where=where)
    return model, tuning.links[0].adapter.seen


def places(batch):
    return batch.place.tolist()


IDS = torch.arange(10, 15)[None].repeat(2, 1)
RIGHT, LEFT = (
    torch.tensor([[1, 1, 1, 0, 0], [1] * 5]),
    torch.tensor([[0, 0, 1, 1, 1], [1] * 5]),
)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_padding_on_both_sides(family):
    model, seen = watched(family)
    for mask, row in (
        (RIGHT, [0, 1, 2, -1, -1]),
        (LEFT, [-1, -1, 0, 1, 2]),
        (None, [0, 1, 2, 3, 4]),
    ):
        model(input_ids=IDS, attention_mask=mask)
        assert places(seen[-1]) == [row, [0, 1, 2, 3, 4]]
        assert seen[-1].size.tolist() == [[1 + max(row)] * 5, [5] * 5]
        assert not seen[-1].decoding


def test_labels_end_the_prompt():
    model, seen = watched("llama")
    labels = torch.tensor([[-100, -100, 12, 13, -100], [10, 11, 12, 13, 14]])
    model(input_ids=IDS, labels=labels)
    assert places(seen[-1]) == [[0, 1, -1, -1, -1], [0, 1, 2, 3, 4]]
    if Version(transformers.__version__) < Version("5.21"):
        return  # a mask of logits to keep is not known there
    keep = torch.tensor(
        [[False, True, True, False, False], [False, False, False, True, False]]
    )
    model(input_ids=IDS, logits_to_keep=keep)
    assert places(seen[-1]) == [[0, 1, -1, -1, -1], [0, 1, 2, 3, -1]]


def test_packed_sequences_each_have_a_prompt():
    model, seen = watched("llama")
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])
    labels = torch.tensor(
        [[-100, -100, 1, -100, 1], [1, 1, -100, -100, 1]]
    )  # of its own, a first label says nothing
    model(IDS, position_ids=positions, labels=labels)
    assert places(seen[-1]) == [[0, 1, -1, 0, 1], [0, 1, 0, 1, -1]]
    assert seen[-1].size.tolist() == [[2, 2, 2, 2, 2], [2, 2, 2, 2, 2]]
    positions = (LEFT.cumsum(1) - 1).clamp(min=0)
    model(IDS, attention_mask=LEFT, position_ids=positions)
    assert places(seen[-1]) == [[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]]


def test_a_classifier_reads_in_both_its_stacks():
    config = transformers.BartConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=32, num_labels=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    model = transformers.BartForSequenceClassification(config)
    seen = [link.adapter.seen for link in petune.attach(model, Spy).links]
    ids = IDS.clone()
    ids[:, -1] = 2
    model(ids, labels=torch.tensor([0, 1]))
    assert len(seen) == 2
    assert all(places(found[-1]) == [[0, 1, 2, 3, 4]] * 2 for found in seen)


@pytest.mark.parametrize(("family", "at"), [("llama", 0), ("bert", 1)])
def test_virtual_tokens_are_none_of_it(family, at):
    model, seen = watched(family)
    petune.attach(model, "prompt-tuning", length=2, name="prompt")
    model(input_ids=IDS, attention_mask=RIGHT)
    row = [0, 1, 2, 3, 4]
    row[at:at] = [-1, -1]
    assert places(seen[-1])[1] == row
    with petune.route(model, ["prompt", "spy"]):
        model(input_ids=IDS)
    assert places(seen[-1]) == [[0, 1, 2, 3, 4, -1, -1]], (
        "the rows of its own, padded to the others' length"
    )
    model(inputs_embeds=torch.randn(2, 5, 64))
    assert places(seen[-1]) == [row, row], "embeddings stand for tokens as ids do"


@pytest.mark.parametrize("cached", [True, False])
def test_generation_adds_nothing_to_the_prompt(cached):
    model, seen = watched("llama")
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
        "use_cache": cached,
    }
    model.generate(IDS, attention_mask=LEFT, num_beams=2, **options)
    assert places(seen[0]) == [[-1, -1, 0, 1, 2]] * 2 + [[0, 1, 2, 3, 4]] * 2
    assert [b.decoding for b in seen] == [False, cached, cached, cached]
    last = [[-1]] * 4 if cached else [row + [-1] * 3 for row in places(seen[0])]
    assert places(seen[-1]) == last
    if cached:
        seen.clear()
        model.generate(IDS, attention_mask=LEFT, prefill_chunk_size=3, **options)
        assert [places(b) for b in seen[:2]] == [
            [[-1, -1, 0], [0, 1, 2]],
            [[1, 2], [3, 4]],
        ]
        seen.clear()
        model.generate(
            IDS,
            attention_mask=LEFT,
            cache_implementation="static",
            disable_compile=True,
            **options,
        )
        assert places(seen[0]) == [[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]]
        assert [b.decoding for b in seen] == [False, True, True, True]
    model(IDS)
    assert places(seen[-1])[0] == [0, 1, 2, 3, 4]


def test_encoder_and_decoder_each_see_their_own():
    model, seen = watched("t5", "encoder.block.0")
    decoder = (
        petune.attach(model, Spy, name="two", where="decoder.block.0")
        .links[0]
        .adapter.seen
    )
    model(input_ids=IDS, attention_mask=RIGHT, labels=IDS[:, :4].contiguous())
    assert places(seen[-1]) == [[0, 1, 2, -1, -1], [0, 1, 2, 3, 4]]
    assert places(decoder[-1]) == [[0, -1, -1, -1]] * 2
    decoder.clear()
    model.generate(
        IDS, attention_mask=RIGHT, max_new_tokens=3, min_new_tokens=3, do_sample=False
    )
    assert places(seen[-1])[0] == [0, 1, 2, -1, -1]
    assert [places(b) for b in decoder] == [[[0]] * 2, [[-1]] * 2, [[-1]] * 2]


def test_without_the_model_around_it_there_is_no_batch():
    model, _ = watched("llama")
    with pytest.raises(petune.UnsupportedError, match="call the model itself"):
        model.model(IDS)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    with pytest.raises(petune.UnsupportedError, match="an attention mask of"):
        model(IDS, attention_mask=mask)
    petune.tunings(model)["spy"].disable()
    model(IDS, attention_mask=mask)


def test_checkpointing_sees_the_batch_of_its_own_forward():
    """Two forwards before one backward: each is recomputed with its own rows."""
    model = tiny_model("llama")
    tuning = shaken(model, "loreft", first=1, last=1)
    one, two = tiny_batch("llama"), tiny_batch("llama", padding=0)
    two["labels"] = two["labels"].clone()
    two["labels"][:, :4] = -100

    def gradients():
        model.zero_grad()
        first = model(**one, use_cache=False).loss
        (2 * model(**two, use_cache=False).loss + first).backward()
        return [p.grad for p in tuning.parameters()]

    model.train()
    plain = gradients()
    checkpoints(model)
    for got, want in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
