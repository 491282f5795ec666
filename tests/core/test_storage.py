"""Saved tunings: what is written, and what a damaged or foreign folder says."""

import json

import pytest
import torch
from safetensors.torch import load_file

import petune
from petune.testing import tiny_batch, tiny_model


@pytest.fixture
def saved(tmp_path):
    model = tiny_model("llama")
    petune.attach(model, "lora", where="q v", rank=4, alpha=3).save(tmp_path)
    return tmp_path


def test_two_files_and_nothing_else(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["adapter.json", "adapter.safetensors"]
    config = json.loads((saved / "adapter.json").read_text())
    assert config["method"] == "lora"
    assert config["arguments"] == {"rank": 4, "alpha": 3.0}
    assert config["where"] == "q v"
    tensors = load_file(saved / "adapter.safetensors")
    assert tensors["model.layers.0.self_attn.q_proj.A"].shape == (4, 64)
    assert len(tensors) == 12


def test_over_an_older_one(saved):
    model = tiny_model("llama")
    petune.attach(model, "ia3").save(saved)
    assert petune.load(tiny_model("llama"), saved).method == "ia3"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "adapter.json").unlink(), "no adapter.json there, so no tuning"),
        (lambda p: (p / "adapter.safetensors").unlink(), "no such file"),
        (lambda p: (p / "adapter.json").write_text("{"), "not JSON"),
        (lambda p: (p / "adapter.json").write_text("{}"), "is not a tuning's"),
        (lambda p: (p / "adapter.json").write_text("[]"), "not a JSON object"),
        (lambda p: (p / "adapter.safetensors").write_bytes(b"x" * 50), "is damaged"),
        (lambda p: edit(p, method="gone"), "unknown method 'gone'"),
        (lambda p: edit(p, petune=99), "newer than this petune"),
        (lambda p: edit(p, where="q"), "which this model has no place for"),
        (lambda p: edit(p, where="q v o"), "it has no 'model.layers"),
        (lambda p: edit(p, arguments={"rank": 8}), r"is \(4, 64\), the model needs \(8, 64\)"),
    ],
)
def test_a_folder_that_does_not_fit(saved, spoil, message):
    spoil(saved)
    model = tiny_model("llama")
    before = model(**tiny_batch("llama")).logits
    with pytest.raises(petune.PetuneError, match=message):
        petune.load(model, saved)
    assert petune.tunings(model) == {}
    assert torch.equal(model(**tiny_batch("llama")).logits, before)


def edit(folder, **changes):
    path = folder / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
