"""Folders of models with a few thousand parameters, and files of a few rows, for tests of the whole workflow."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from petune.core.registry.plugins import registry

TEXT = "good bad fine awful movie film plot actor the a is was very not so happy sad day night one two three"
WORDS = TEXT.split()
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SMALL = SIZES | {"vocab_size": 96}
IDS = torch.arange(10)[None]  # (batch, length)


def save_tokenizer(folder: Path, **more: Any) -> int:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>", *WORDS]
    plain = Tokenizer(
        models.WordLevel(
            {word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"
        )
    )
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        unk_token="[UNK]",
        pad_token="[PAD]",
        eos_token="</s>",
        **more,
    )
    fast.save_pretrained(folder)
    return len(vocabulary)


def save_decoder(folder: Path) -> Path:
    size = save_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=4,
        bos_token_id=None,
        **SIZES,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_encoder(folder: Path) -> Path:
    size = save_tokenizer(folder, cls_token="[CLS]", sep_token="[SEP]")
    torch.manual_seed(0)
    BertModel(
        BertConfig(vocab_size=size, max_position_embeddings=128, **SIZES)
    ).save_pretrained(folder)
    return folder


def rows(run: str) -> list[dict[str, Any]]:
    """What a run has logged."""
    return [
        json.loads(line)
        for line in (Path(run) / "metrics.jsonl").read_text().splitlines()
    ]


def opinions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts whose label can be read off one word."""
    pick = random.Random(seed)
    rows = []
    for number in range(count):
        label = pick.choice(["neg", "pos"])
        words = pick.choices(WORDS[4:], k=pick.randint(2, 12))
        words.insert(pick.randrange(len(words)), "good" if label == "pos" else "bad")
        rows.append({"id": number, "sentence": " ".join(words), "gold": label})
    return rows


def questions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    pick = random.Random(seed)
    return [
        {
            "ask": " ".join(pick.choices(WORDS[4:], k=pick.randint(2, 8))) + f" {word}",
            "reply": f"the {word}",
        }
        for word in pick.choices(["one", "two", "three"], k=count)
    ]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def recipe(tmp_path: Path, encoder: Path) -> dict[str, Any]:
    """A classification of opinions: trained in a blink."""
    return {
        "model": str(encoder),
        "method": "lora",
        "method_args": {"rank": 4},
        "task": "classification",
        "data": str(jsonl(tmp_path / "opinions.jsonl", opinions(60))),
        "columns": {"text": "sentence", "label": "gold"},
        "training": {
            "steps": 6,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "log_every": 2,
        },
        "output": str(tmp_path / "run"),
    }


@pytest.fixture
def file(recipe: dict[str, Any], tmp_path: Path) -> str:
    """The same, written down."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


@pytest.fixture
def generation(tmp_path: Path, decoder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    return {
        **recipe,
        "model": str(decoder),
        "task": "generation",
        "data": str(jsonl(tmp_path / "questions.jsonl", questions(60))),
        "columns": {"prompt": "ask", "completion": "reply"},
        "training": {**recipe["training"], "max_new_tokens": 4},
        "output": str(tmp_path / "answers"),
    }


@pytest.fixture
def single_files() -> Iterator[None]:
    """The single-file plugins that a test loads are forgotten after it."""
    yield
    registry.cache_clear()


@pytest.fixture
def defaults(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> dict[str, Any]:
    """What the cells of a benchmark share."""
    return {
        "model": str(encoder),
        "task": "classification",
        "data": str(
            jsonl(tmp_path_factory.mktemp("bench") / "rows.jsonl", opinions(120))
        ),
        "columns": {"text": "sentence", "label": "gold"},
        "training": {"steps": 3, "batch_size": 8, "learning_rate": 1e-2},
    }


@pytest.fixture
def suite(tmp_path: Path, defaults: dict[str, Any]) -> Callable[..., str]:
    """Writes tiny.yaml with these cells and returns its path."""

    def write(*cells: dict[str, Any], **more: Any) -> str:
        path = tmp_path / "tiny.yaml"
        path.write_text(
            yaml.safe_dump(
                {
                    "title": "A tiny suite",
                    "defaults": defaults,
                    "cells": list(cells),
                    **more,
                }
            )
        )
        return str(path)

    return write


def weights(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "adapter" / "adapter.safetensors")


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.allclose(a[key], b[key], atol=1e-6, rtol=0) for key in a
    )


def changed(recipe: dict[str, Any], **training: Any) -> dict[str, Any]:
    return {**recipe, "training": {**recipe["training"], **training}}


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
