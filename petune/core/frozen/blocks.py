"""The blocks that repeat in a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from petune.core.frozen.modules import children, inside, linears


class Repeated(NamedTuple):
    """A block: its name in the model, its number in its list, and the module."""

    name: str
    layer: int
    module: nn.Module


def blocks(model: nn.Module, name: str = "") -> Iterator[Repeated]:
    """The blocks of the outermost module lists, items with less than two linear layers left out."""
    for child_name, child in children(model):
        path = inside(name, child_name)
        found = list(_of_list(child, path)) if isinstance(child, nn.ModuleList) else []
        yield from found or blocks(child, path)


def _of_list(modules: nn.ModuleList, name: str) -> Iterator[Repeated]:
    for i, (path, item) in enumerate(_items(modules, name)):
        if len(linears(item, "")) > 1:
            yield Repeated(path, i, item)


def _items(modules: nn.ModuleList, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a list, and of lists in it."""
    for i, item in enumerate(modules):
        path = f"{name}.{i}"
        if isinstance(item, nn.ModuleList):
            yield from _items(item, path)
        else:
            yield path, item
