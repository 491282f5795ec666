"""Prompts that start as a text."""

import json

import pytest
import torch

import petune
from petune.testing import tiny_model

TEXT = "the film is good"


@pytest.mark.parametrize("which", ["encoder", "decoder"])
def test_rows_start_as_those_of_the_text(which, request, tmp_path):
    model = petune.from_pretrained(request.getfixturevalue(which))
    tokenizer = petune.load_tokenizer(request.getfixturevalue(which))
    ids = tokenizer.convert_tokens_to_ids(TEXT.split())
    tuning = petune.attach(model, "prompt-tuning", text=TEXT)
    rows = tuning.adapters["prompt"].rows
    assert torch.equal(rows, model.get_input_embeddings().weight[ids])
    assert tuning.adapters["prompt"].length == 4
    tuning.save(tmp_path)
    assert json.loads((tmp_path / "adapter.json").read_text())["arguments"] == {
        "length": 4,
        "text": None,
        "init": ids,
    }
    tuning.detach()
    model.config.name_or_path = ""  # no tokenizer from here on
    assert torch.equal(petune.load(model, tmp_path).adapters["prompt"].rows, rows)


def test_a_text_is_cut_or_repeated_to_the_length(decoder):
    model = petune.from_pretrained(decoder)
    table = model.get_input_embeddings().weight.detach().clone()
    ids = petune.load_tokenizer(decoder).convert_tokens_to_ids(TEXT.split())
    for length in (3, 10):
        tuning = petune.attach(model, "prompt-tuning", text=TEXT, length=length)
        assert torch.equal(tuning.adapters["prompt"].rows, table[(ids * 3)[:length]])
        tuning.detach()


def test_a_text_that_can_not_be_read(decoder):
    with pytest.raises(petune.PetuneError, match="does not say where its tokenizer is"):
        petune.attach(tiny_model("llama"), "prompt-tuning", text=TEXT)
    model = petune.from_pretrained(decoder)
    with pytest.raises(petune.PetuneError, match="init is given as well"):
        petune.attach(model, "prompt-tuning", text=TEXT, init=[3])
    with pytest.raises(petune.PetuneError, match="has no tokens"):
        petune.attach(model, "prompt-tuning", text=" ")
    assert petune.tunings(model) == {}
