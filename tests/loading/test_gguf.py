"""GGUF files: unpacked once, exactly, and then models like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from samples import IDS
from transformers import LlamaForCausalLM

import petune
from petune import PetuneError


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """A Llama of two layers in Q4_1 blocks, as llama.cpp writes one; returns what its numbers say."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(96)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(
        ["<|endoftext|>", "<s>", "</s>", "w", "0", "w0", *(f"x{i}" for i in range(90))]
    )
    writer.add_token_types([3, 3, 3] + [1] * 93)
    writer.add_token_merges(["w 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (96, 64), "output_norm": (64,), "output": (96, 64)}
    for layer in range(2):
        block = {
            "attn_norm": (64,),
            "ffn_norm": (64,),
            "ffn_up": (128, 64),
            "ffn_gate": (128, 64),
            "ffn_down": (64, 128),
        }
        block |= {f"attn_{part}": (64, 64) for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    exact = {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            packed = quantize(values, GGMLQuantizationType.Q4_1)
            writer.add_tensor(
                f"{name}.weight", packed, raw_dtype=GGMLQuantizationType.Q4_1
            )
            values = dequantize(packed, GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(f"{name}.weight", values)
        exact[name] = torch.from_numpy(values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact


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
