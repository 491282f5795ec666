"""Saved tunings: what is written, and formats of anyone's."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shaken import moved

import petune
from petune.core.registry.plugins import registry
from petune.testing import tiny_batch, tiny_model
from petune.testing.behaviours import logits

PAGE = Path(__file__).parents[2] / "docs/plugins.md"


@pytest.fixture
def saved(tmp_path):
    model = tiny_model("llama")
    petune.attach(model, "lora", where="q v", rank=4, alpha=3).save(tmp_path)
    return tmp_path


def test_two_files_and_nothing_else(saved):
    assert sorted(p.name for p in saved.iterdir()) == [
        "adapter.json",
        "adapter.safetensors",
    ]
    config = json.loads((saved / "adapter.json").read_text())
    assert config["method"] == "lora"
    assert config["arguments"] == {
        "rank": 4,
        "alpha": 3.0,
        "dropout": 0.0,
        "rslora": False,
        "init": "default",
        "lr_ratio": 1.0,
        "bias": False,
    }
    assert config["plugins"] == {"lora": f"lowrank {petune.__version__}"}
    assert config["version"] == petune.__version__
    assert config["where"] == "q v"
    tensors = load_file(saved / "adapter.safetensors")
    assert tensors["model.layers.0.self_attn.q_proj.A"].shape == (4, 64)
    assert len(tensors) == 12


def test_over_an_older_one(saved):
    model = tiny_model("llama")
    petune.attach(model, "ia3").save(saved)
    assert petune.load(tiny_model("llama"), saved).method == "ia3"


@pytest.fixture
def plug(tmp_path):
    """Give a single-file plugin."""

    def add(name, text):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        registry().add_file(path)

    yield add
    registry.cache_clear()


def documented():
    """The format of the page on plugins."""
    blocks = re.findall(
        r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    return next(block for block in blocks if "def petune_formats" in block)


def test_a_format_of_anyones(plug, tmp_path):
    plug("updates", documented())
    options = {"where": "q v down", "rank": 3, "rank_pattern": {"q": 5}, "rslora": True}
    model, tuning = moved("lora", **options)
    tuning.weight = 0.5
    tuning.save(tmp_path / "out", format="updates")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "updates.json",
        "updates.safetensors",
    ]
    again = tiny_model("llama")
    loaded = petune.load(again, tmp_path / "out", name="other")
    assert (loaded.name, loaded.method) == ("other", "lora")
    torch.testing.assert_close(
        logits(again, tiny_batch("llama")), logits(model, tiny_batch("llama"))
    )


def test_what_a_format_can_not_hold_or_is_not_called(plug, tmp_path):
    plug("updates", documented())
    _, tuning = moved("ia3")
    with pytest.raises(petune.UnsupportedError, match="updates are LoRA's alone"):
        tuning.save(tmp_path / "out", format="updates")
    with pytest.raises(petune.PetuneError, match="Did you mean 'updates'") as error:
        tuning.save(tmp_path / "out", format="update")
    assert "Known: peft, petune, serving, updates." in str(error.value)
    with pytest.raises(petune.PetuneError, match="Did you mean 'petune'"):
        tuning.save(tmp_path / "out", format="petun")
    assert not (tmp_path / "out").exists()


def test_formats_that_share_a_name_are_told_apart_by_the_other(plug, tmp_path):
    """PEFT's JSON has the same name; a folder with only that goes to PEFT's, which says what is missing."""
    plug("updates", documented().replace("updates.json", "adapter_config.json"))
    for format, rank in (("updates", 3), ("peft", 4)):
        _, tuning = moved("lora", rank=rank)
        tuning.save(tmp_path / format, format=format)
        assert {
            len(a.A)
            for a in petune.load(
                tiny_model("llama"), tmp_path / format
            ).adapters.values()
        } == {rank}
    (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    with pytest.raises(
        petune.PetuneError, match=r"adapter_model\.safetensors is missing"
    ):
        petune.load(tiny_model("llama"), tmp_path / "peft")
