"""The sites of a model that are in no block: the prompt, the embedding, the norms around the stacks, the heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from petune.core.frozen.modules import children, features, is_norm, walk, width_of
from petune.core.frozen.site import Site
from petune.core.frozen.tables import input_table


class Outside:
    """What stands around a model's blocks.

    Args:
        blocks: the names of the blocks.
    """

    def __init__(self, model: Any, blocks: list[str]) -> None:
        self.model = model
        self.in_blocks = tuple(f"{name}." for name in blocks)
        self.table = input_table(model)
        self.hidden = int(self.table.weight.shape[-1]) if self.table is not None else 0
        self.head = model.get_output_embeddings()
        self.tables = self._tables()
        self.heads = self._new_heads()

    def sites(self) -> Iterator[Site]:
        """The sites, in the order of the model's modules, the prompt first."""
        if self.table is not None:
            yield Site("prompt", "prompt", "prompt", None, self.hidden, self.hidden, self.model)
        behind_a_block = False
        for name, module in walk(self.model):
            if name.startswith(self.in_blocks):
                behind_a_block = True
                continue
            found = self._site(name, module, "final" if behind_a_block else "embed-norm")
            if found is not None:
                yield found

    def _site(self, name: str, module: Any, norm: str) -> Site | None:
        """The site of a module, if it is one; `norm` is what a norm's role would be."""
        if module in self.tables:
            rows, tied = module.weight.shape[0], self._is_shared(module)
            return Site(name, "embedding", "embed", None, rows, self.hidden, module, tied=tied)
        size = features(module)
        if module is self.head and size:
            return Site(name, "linear", "head", None, *size, module, tied=self._is_shared(module))
        if name in self.heads:
            return Site(name, "module", "classifier", None, *(size or self._as_wide()), module)
        if is_norm(module):
            width = width_of(module)
            return Site(name, "block", norm, None, width, width, module)
        return None

    def _as_wide(self) -> tuple[int, int]:
        """The sizes of a head that is more than a linear layer."""
        return self.hidden, self.hidden

    def _is_shared(self, module: Any) -> bool:
        """Whether the head and the input embedding have one table, and the module is one of them."""
        if self.table is None or self.head is None:
            return False
        return (
            module.weight is self.table.weight
            and getattr(self.head, "weight", None) is module.weight
        )

    def _tables(self) -> list[nn.Module]:
        """The modules of the input embedding: T5's stacks each have one of their own for the same table."""
        if self.table is None:
            return []
        same = [
            module
            for _, module in walk(self.model)
            if isinstance(module, nn.Embedding) and module.weight is self.table.weight
        ]
        others = [module for module in same if module is not self.table]
        return others or same

    def _new_heads(self) -> list[str]:
        """The modules around the base model that are no output embedding: the heads of other tasks."""
        base = getattr(self.model, "base_model", self.model)
        if base is self.model:
            return []
        around = [(name, module) for name, module in children(self.model) if module is not base]
        own = [(name, module) for name, module in around if self.head not in set(module.modules())]
        return [name for name, module in own if list(module.parameters())]
