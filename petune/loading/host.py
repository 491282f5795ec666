"""What loading leans on in transformers that has no public name, or another one in older versions, each with a check
that it still holds.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import logging as chatter

from petune.core.host.seam import Seams

SEAMS = Seams()


@SEAMS.lean(
    "transformers",
    "PreTrainedModel._from_config(config)",
    since="4.1",
    why="build a model of the class that a checkpoint names without its weights",
)
def _models_are_built_from_configurations() -> bool:
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=0,
        num_attention_heads=1,
    )
    with torch.device("meta"):
        model = built(transformers.LlamaForCausalLM, config)
    return type(model) is transformers.LlamaForCausalLM and model.device.type == "meta"


def built(loader: Any, config: Any) -> PreTrainedModel:
    """A model with fresh weights.

    Args:
        loader: a model's class, or one of transformers' auto classes.
    """
    build = (
        loader.from_config if hasattr(loader, "from_config") else loader._from_config
    )
    model: PreTrainedModel = build(config)
    return model


@SEAMS.lean(
    "transformers",
    "transformers.utils.logging.set_tqdm_hook(hook), where hook(factory, args, kwargs) makes a bar",
    since="5.4",
    why="hide the bar of a load that takes a second",
)
def _bars_are_made_by_the_hook() -> bool:
    if _has_hook():
        with hidden_bars():
            return bool(chatter.tqdm(range(1)).disable)
    return not hasattr(chatter, "_tqdm_hook")  # older than the hook


def _has_hook() -> bool:
    return hasattr(chatter, "set_tqdm_hook")


@contextmanager
def hidden_bars() -> Iterator[None]:
    """Within the context transformers shows no progress bars of its own; before 5.4 it does."""
    if not _has_hook():
        yield
        return
    before = chatter.set_tqdm_hook(_hidden)
    try:
        yield
    finally:
        chatter.set_tqdm_hook(before)


def _hidden(factory: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return factory(*args, **{**options, "disable": True})


@SEAMS.lean(
    "transformers",
    "GgufConfig(dequantize)",
    since="5.17",
    why="read a GGUF file as a dense model",
)
def _gguf_files_are_read_dense() -> bool:
    config = _gguf_config()
    if config is None:
        # before 5.17 transformers reads them dense by itself
        return not _has_gguf_quantizer()
    return "dequantize" in inspect.signature(config).parameters


def _gguf_config() -> Any:
    return getattr(transformers, "GgufConfig", None)


def _has_gguf_quantizer() -> bool:
    from importlib.util import find_spec

    return find_spec("transformers.quantizers.quantizer_gguf") is not None


def dense_gguf() -> dict[str, Any]:
    """Arguments of `from_pretrained` by which a GGUF file becomes a dense model."""
    config = _gguf_config()
    return {} if config is None else {"quantization_config": config(dequantize=True)}
