"""A tiny BERT that bitsandbytes can quantize, its tokenizer, and a file of sentences that one word decides."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

WORDS = "good bad fine awful movie film plot actor the a is was very not so happy sad day night one two three"


def make_model(folder: Path) -> Path:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS.split()])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    BertModel(config).save_pretrained(folder)
    return folder


def make_rows(file: Path, count: int = 120) -> Path:
    pick = random.Random(0)
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(count):
            gold = pick.choice(["neg", "pos"])
            words = [*pick.choices(WORDS.split()[4:], k=pick.randint(2, 9)), "good" if gold == "pos" else "bad"]
            lines.write(json.dumps({"sentence": " ".join(words), "gold": gold}) + "\n")
    return file


@pytest.fixture(scope="session")
def defaults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    return {
        "model": str(make_model(folder / "bert")),
        "task": "classification",
        "data": str(make_rows(folder / "rows.jsonl")),
        "columns": {"text": "sentence", "label": "gold"},
        "training": {"steps": 3, "batch_size": 8, "learning_rate": 1e-2},
    }


@pytest.fixture
def suite(tmp_path: Path, defaults: dict[str, Any]) -> Any:
    """Writes tiny.yaml with these cells and returns its path."""

    def write(*cells: dict[str, Any], **more: Any) -> str:
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({"title": "A tiny suite", "defaults": defaults, "cells": list(cells), **more}))
        return str(path)

    return write
