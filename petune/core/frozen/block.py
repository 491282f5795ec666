"""One block of a model, whose modules go by their names in the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from petune.core.frozen.blocks import Repeated
from petune.core.frozen.modules import LISTS, features, is_norm, linears, walk, width_of
from petune.core.frozen.site import Site


class Block:
    """A block and what it makes sites of.

    Args:
        embedded: the width of the model's embedding, which is that of the stream where a norm has it.

    Attributes:
        modules: the modules in it, itself included, by their names in the model.
        hidden: the width of the residual stream.
    """

    def __init__(self, found: Repeated, embedded: int = 0) -> None:
        self.name, self.layer = found.name, found.layer
        self.modules = dict(walk(found.module, found.name))
        widths = list(map(width_of, filter(is_norm, self.modules.values())))
        most = max(widths, key=widths.count, default=0)
        self.hidden = embedded if embedded in widths else most

    def site(
        self, name: str, role: str, width: int, kind: str = "block", **more: Any
    ) -> Site:
        """A site of the module that `name` begins with: `#role` may stand behind it."""
        module = self.modules[name.partition("#")[0]]
        return Site(name, kind, role, self.layer, width, width, module, **more)

    def linear(self, name: str, role: str) -> Site:
        """A linear layer's site."""
        into, out = self.size(name)
        return Site(name, "linear", role, self.layer, into, out, self.modules[name])

    def size(self, name: str) -> tuple[int, int]:
        """(in, out) of a linear layer."""
        return features(self.modules[name]) or (0, 0)

    def linears(self, name: str) -> list[str]:
        """The names of the linear layers in a module."""
        return list(dict(linears(self.modules[name], name)))

    def around(self, name: str) -> Iterator[str]:
        """The modules around one, from the smallest to the block."""
        while name != self.name:
            name = name.rpartition(".")[0]
            yield name

    def outermost(self, names: Sequence[str]) -> list[str]:
        """Those of the modules that stand in none of the others."""
        given = set(names)
        return [name for name in names if given.isdisjoint(self.around(name))]

    def sublayer(self, role: str, name: str, out: Site, entry: nn.Module) -> Site:
        """What a sublayer adds to the residual stream. Where the norm and the sum are inside (BERT), it is seen
        between the modules: its input at `entry`, its output at the last projection.
        """
        width = out.out_features
        if name == self.name or self._is_more_than(name, width):
            return self.site(f"{out.name}#{role}", role, width, entry=entry)
        return self.site(f"{name}#{role}", role, width)

    def _is_more_than(self, name: str, width: int) -> bool:
        """Whether a module is more than the sublayer in it: it has a norm of the stream, or runs what is put in it."""
        whole = self.modules[name]
        if isinstance(whole, LISTS):
            return True
        inner = dict(walk(whole)).values()
        return width in map(width_of, filter(is_norm, inner))
