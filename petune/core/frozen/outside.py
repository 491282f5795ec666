"""The sites of a model that are in no block: the prompt, the embedding, the norms and linear
layers around the stacks, the heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from petune.core.frozen.blocks import Repeated
from petune.core.frozen.modules import children, features, is_norm, walk, width_of
from petune.core.frozen.site import Site
from petune.core.frozen.tables import input_table

Maker = Callable[[str, nn.Module], Site]
"""Makes a site of a module that goes by a name."""


class Outside:
    """What stands around the blocks of a model."""

    def __init__(self, model: Any, blocks: Sequence[Repeated]) -> None:
        self.model = model
        self.in_blocks = tuple(map("{0.name}.".format, blocks))
        self.head = model.get_output_embeddings()
        self.table: Any = input_table(model)
        self.hidden = int(getattr(self.table, "embedding_dim", 0))
        self.makers: dict[Any, Maker] = {}
        self.makers.update(dict.fromkeys(self._new_heads(), self._classifier))
        if features(self.head or model):
            self.makers[self.head] = self._linear
        self.makers.update(dict.fromkeys(self._tables(), self._embedding))

    def sites(self) -> Iterator[Site]:
        """The sites, in the order of the model's modules, the prompt first."""
        if self.table is not None:
            hidden = self.hidden
            yield Site("prompt", "prompt", "prompt", None, hidden, hidden, self.model)
        norm = "embed-norm"
        for name, module in walk(self.model):
            if name.startswith(self.in_blocks):
                norm = "final"
            elif module in self.makers:
                yield self.makers[module](name, module)
            elif is_norm(module):
                width = width_of(module)
                yield Site(name, "block", norm, None, width, width, module)
            elif features(module):
                yield replace(self._linear(name, module), role="other")

    def _classifier(self, name: str, module: nn.Module) -> Site:
        into, out = features(module) or (self.hidden, self.hidden)
        return Site(name, "module", "classifier", None, into, out, module)

    def _embedding(self, name: str, module: nn.Module) -> Site:
        rows, width = len(module.get_parameter("weight")), self.hidden
        tied = self._is_shared(module)
        return Site(name, "embedding", "embed", None, rows, width, module, tied=tied)

    def _linear(self, name: str, module: nn.Module) -> Site:
        size = features(module)
        assert size is not None, f"{name} is no linear layer"
        into, out = size
        tied = self._is_shared(module)
        return Site(name, "linear", "head", None, into, out, module, tied=tied)

    def _is_shared(self, module: Any) -> bool:
        """Whether the table of a module is both the input embedding's and the head's."""
        owners = (module, self.table, self.head)
        tables = {id(getattr(owner, "weight", None)) for owner in owners}
        return len(tables) == 1

    def _tables(self) -> set[nn.Module]:
        """The modules of the input embedding: T5's stacks each have one of their own for
        the same table.
        """
        modules = dict(walk(self.model)).values()
        same = set(filter(self._is_input_table, modules))
        return same - {self.table} or same

    def _is_input_table(self, module: nn.Module) -> bool:
        weight = getattr(self.table, "weight", self)
        return isinstance(module, nn.Embedding) and module.weight is weight

    def _new_heads(self) -> Iterator[nn.Module]:
        """The modules around the base model that hold no output embedding: the heads of
        other tasks.
        """
        base = getattr(self.model, "base_model", self.model)
        if base is self.model:
            return
        for _, module in children(self.model):
            others = {base, self.head}.isdisjoint(module.modules())
            if others and list(module.parameters()):
                yield module
