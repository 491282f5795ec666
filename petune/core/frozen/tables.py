"""A model's tables of input embeddings, and how it reads what they give."""

from __future__ import annotations

from typing import Any

from torch import nn

from petune.core.frozen.modules import base_class, base_forward

LOOKED_AT = 1000
"""How many rows of a table are looked at for one that is not zero."""


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
    """The modules that embed input ids: T5's stacks each have one of their own, and Gemma
    3n looks ids up once more for each layer.
    """
    table = model.get_input_embeddings()
    text = getattr(model.config, "text_config", model.config)
    second = getattr(text, "vocab_size_per_layer_input", None)
    cls, shape = base_class(table), table.weight.shape

    def reads_ids(module: Any) -> bool:
        if base_class(module) is not cls:
            return False
        return module.weight.shape == shape or module.num_embeddings == second

    return list(filter(reads_ids, model.modules()))


def row_gain(table: Any) -> float:
    """What an embedding multiplies its rows by, read off its longest row."""
    rows = table.weight.detach()[:LOOKED_AT].float()
    longest = rows.norm(dim=1).argmax()
    stored = float(rows[longest].norm())
    given = base_forward(table)(longest[None]).detach().float()
    return float(given.norm()) / stored if stored else 1.0


def is_causal(model: nn.Module) -> bool:
    """A decoder reads left to right; an encoder's first token is the one that its classes are read from."""
    told = {getattr(module, "is_causal", None) for module in model.modules()}
    flags = told & {True, False}
    return True in flags if flags else bool(model.can_generate())  # type: ignore[operator]
