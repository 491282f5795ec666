"""The sites of a model that are in no block: the prompt, the embedding, the norms around
the stacks, the heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from petune.core.frozen.blocks import Repeated
from petune.core.frozen.modules import children, features, is_norm, walk, width_of
from petune.core.frozen.site import Site
from petune.core.frozen.tables import input_table


class Outside:
    """What stands around the blocks of a model."""

    def __init__(self, model: Any, blocks: Sequence[Repeated]) -> None:
        self.model = model
        self.in_blocks = tuple(f"{block.name}." for block in blocks)
        self.head = model.get_output_embeddings()
        self.table: Any = input_table(model)
        self.hidden = 0 if self.table is None else int(self.table.weight.shape[-1])
        self.tables = set(self._tables())
        self.heads = set(self._new_heads())

    def sites(self) -> Iterator[Site]:
        """The sites, in the order of the model's modules, the prompt first."""
        if self.table is not None:
            hidden = self.hidden
            yield Site("prompt", "prompt", "prompt", None, hidden, hidden, self.model)
        norm = "embed-norm"
        for name, module in walk(self.model):
            if name.startswith(self.in_blocks):
                norm = "final"
                continue
            found = self._site(name, module, norm)
            if found is not None:
                yield found

    def _site(self, name: str, module: Any, norm: str) -> Site | None:
        """The site of a module, if it is one; `norm` is what a norm's role would be."""
        size = features(module)
        if module in self.tables:
            return self._embedding(name, module)
        if module is self.head and size is not None:
            return self._linear(name, module, size)
        if module in self.heads:
            into, out = size or (self.hidden, self.hidden)
            return Site(name, "module", "classifier", None, into, out, module)
        return self._norm(name, module, norm) if is_norm(module) else None

    def _norm(self, name: str, module: Any, role: str) -> Site:
        width = width_of(module)
        return Site(name, "block", role, None, width, width, module)

    def _embedding(self, name: str, module: Any) -> Site:
        rows, tied = module.weight.shape[0], self._is_shared(module)
        return Site(
            name, "embedding", "embed", None, rows, self.hidden, module, tied=tied
        )

    def _linear(self, name: str, module: Any, size: tuple[int, int]) -> Site:
        tied = self._is_shared(module)
        return Site(name, "linear", "head", None, *size, module, tied=tied)

    def _is_shared(self, module: Any) -> bool:
        """Whether the table of a module is both the input embedding's and the head's."""
        owners = (module, self.table, self.head)
        tables = {id(getattr(owner, "weight", None)) for owner in owners}
        return len(tables) == 1

    def _tables(self) -> list[nn.Module]:
        """The modules of the input embedding: T5's stacks each have one of their own for
        the same table.
        """
        modules = dict(walk(self.model)).values()
        same = [module for module in modules if self._is_input_table(module)]
        others = [module for module in same if module is not self.table]
        return others or same

    def _is_input_table(self, module: nn.Module) -> bool:
        if self.table is None or not isinstance(module, nn.Embedding):
            return False
        return module.weight is self.table.weight

    def _new_heads(self) -> Iterator[nn.Module]:
        """The modules around the base model that hold no output embedding: the heads of
        other tasks.
        """
        base = getattr(self.model, "base_model", self.model)
        around = dict(children(self.model)) if base is not self.model else {}
        for module in around.values():
            kept = {base, self.head}.isdisjoint(module.modules())
            if kept and list(module.parameters()):
                yield module
