"""How many tokens a model has positions for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_TABLE = re.compile(r"pos(ition)?s?_embed|embed_pos|pos_enc|(^|_)wpe$")
"""What modules and buffers with a row a position are called."""
_OTHER = re.compile("vision|visual|image|audio|speech")
"""What is in the names of those that see no tokens of text."""


def places(model: nn.Module) -> int | None:
    """The most tokens that a model takes at once, told by its tables of positions; None where it has no such table,
    since it computes positions (rotations, ALiBi) or knows relative ones alone.
    """
    config = getattr(model, "config", None)
    said = getattr(config, "max_position_embeddings", None)
    found = list(_tables(model))
    if found and isinstance(said, int) and said > 0:
        found.append(said)
    return min(found, default=None)


def _tables(model: nn.Module) -> Iterator[int]:
    """The usable rows of every table."""
    for name, module in model.named_modules():
        table: Any = getattr(module, "weight", None)
        if _is_table(name, table):
            yield len(table) - _offset(module)
    for name, buffer in model.named_buffers():
        if _is_table(name, buffer) and buffer.is_floating_point():
            yield len(buffer)


def _is_table(name: str, table: object) -> bool:
    named = _TABLE.search(name.rpartition(".")[2]) and not _OTHER.search(name)
    return bool(named) and isinstance(table, Tensor) and table.dim() == 2


def _offset(module: nn.Module) -> int:
    """The rows before that of the first token: RoBERTa counts from behind its padding, OPT and BART from 2."""
    padding = getattr(module, "padding_idx", None)
    behind = 0 if padding is None else int(padding) + 1
    offset: int = getattr(module, "offset", behind)
    return offset
