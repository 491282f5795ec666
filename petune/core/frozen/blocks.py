"""The blocks that repeat in a model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

from torch import nn

from petune.core.frozen.modules import children, inside, linears


class Repeated(NamedTuple):
    """A block: its name in the model, its number in its list, and the module."""

    name: str
    layer: int
    module: nn.Module

    def has_linears(self) -> bool:
        """Whether it is worth the name: it holds two linear layers at least."""
        return len(linears(self.module, "")) > 1


def blocks(model: nn.Module, name: str = "") -> Iterator[Repeated]:
    """The blocks of the outermost module lists, items with less than two linear layers left out."""
    for child_name, child in children(model):
        path = inside(name, child_name)
        items = dict(_items(child, path))
        numbered = map(Repeated, items, count(), items.values())
        found = list(filter(Repeated.has_linears, numbered))
        yield from found or blocks(child, path)


def _items(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a list, and of lists in it; nothing of another module."""
    if not isinstance(module, nn.ModuleList):
        return
    for number, item in module.named_children():
        path = inside(name, number)
        if isinstance(item, nn.ModuleList):
            yield from _items(item, path)
        else:
            yield path, item
