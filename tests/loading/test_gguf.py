"""GGUF files: unpacked once, exactly, and then models like any other."""

from __future__ import annotations

import pytest
import torch
from samples import IDS, write_gguf
from transformers import LlamaForCausalLM

import petune
from petune import PetuneError


def test_a_gguf_file_is_unpacked_once_and_exactly_and_takes_any_precision(
    tmp_path, monkeypatch, quantizer, capsys
):
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    exact = write_gguf(tmp_path / "tiny.gguf")
    model = petune.from_pretrained(tmp_path / "tiny.gguf")
    assert "petune: unpacking tiny.gguf\n" in capsys.readouterr().err
    assert type(model) is LlamaForCausalLM
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, exact["blk.1.ffn_up"])
    assert torch.equal(model.lm_head.weight, exact["output"])
    assert torch.isfinite(model(IDS).logits).all()
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(
        petune.from_pretrained(tmp_path / "again")(IDS).logits, model(IDS).logits
    )

    classifier = petune.from_pretrained(
        tmp_path / "tiny.gguf", precision="pretend", head="sequence-classification"
    )
    assert classifier.petune_fresh == ("score",)
    assert quantizer.asked[0] == (["score"], torch.float32)
    assert len(petune.load_tokenizer(tmp_path / "tiny.gguf")) == 96
    assert "unpacking" not in capsys.readouterr().err

    write_gguf(tmp_path / "tiny.gguf")
    petune.from_pretrained(tmp_path / "tiny.gguf")
    assert "unpacking" in capsys.readouterr().err, "a changed file is another model"


def test_a_file_that_is_no_gguf_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(PetuneError, match=r"^[^\n]*bad\.gguf[^\n]+$"):
        petune.from_pretrained(tmp_path / "bad.gguf")
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))
