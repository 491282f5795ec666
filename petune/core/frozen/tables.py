"""A model's tables of input embeddings, and how it reads what they give."""

from __future__ import annotations

from typing import Any

from torch import nn

from petune.core.frozen.modules import base_class


def input_table(model: nn.Module) -> nn.Embedding | None:
    """The input embedding, None where the model has no single table."""
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (
        NotImplementedError,
        AttributeError,
    ):  # so transformers says that an architecture names none
        return None
    return table if isinstance(table, nn.Embedding) else None


def tables(model: Any) -> list[nn.Module]:
    """The modules that embed input ids: T5's stacks each have one of their own, and Gemma 3n looks ids up once
    more for each layer.
    """
    table = model.get_input_embeddings()
    text = getattr(model.config, "text_config", model.config)
    vocabularies = {
        table.num_embeddings,
        getattr(text, "vocab_size_per_layer_input", None),
    }
    found: list[nn.Module] = []
    for module in model.modules():
        is_like = isinstance(module, nn.Embedding) and base_class(module) is base_class(
            table
        )
        if (
            is_like
            and module.num_embeddings in vocabularies
            and _reads_ids(module, table)
        ):
            found.append(module)
    return found


def _reads_ids(module: nn.Embedding, table: nn.Embedding) -> bool:
    """Whether the table is the input embedding's like, or one of another vocabulary."""
    another = module.num_embeddings != table.num_embeddings
    return another or module.weight.shape == table.weight.shape


def is_causal(model: nn.Module) -> bool:
    """A decoder reads left to right; an encoder's first token is the one that its classes are read from."""
    told = [getattr(module, "is_causal", None) for module in model.modules()]
    flags = [flag for flag in told if isinstance(flag, bool)]
    return any(flags) if flags else bool(model.can_generate())  # type: ignore[operator]
