"""The attentions of a block: where each begins and ends, its projections, and the shape of
its heads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from petune.core.frozen.block import Block
from petune.core.frozen.computes import calls_attention_interface, computes_attention
from petune.core.frozen.geometry import geometry
from petune.core.frozen.modules import base_class, linears
from petune.core.frozen.roles import CROSS, attention_roles, spelled
from petune.core.frozen.site import Site, with_role

Methods = Mapping[str, Callable[..., Any]]
Known = Mapping[type, Methods]
"""Classes of attention that are told, each with methods that do the same by `petune.attend`."""


class Attentions:
    """The attentions of a block.

    Attributes:
        cores: the names of the modules that compute attention, or, where none is found, of
            those that are called so.
        wholes: for each the name of the smallest module around it that also holds its
            output projection.
    """

    def __init__(self, block: Block, known: Known) -> None:
        self.block, self.known = block, known
        modules = block.modules
        found = [name for name in modules if self._is_attention(modules[name])]
        self.cores = found or self._named()
        self.wholes = list(map(self._with_output, self.cores))

    def sites(self) -> Iterator[Site]:
        """The sites of all of them."""
        for core, whole in zip(self.cores, self.wholes, strict=True):
            yield from self._sites(core, whole)

    def holds(self, name: str) -> bool:
        """Whether a module stands in one of them."""
        return not set(self.cores).isdisjoint(self.block.around(name))

    def _is_attention(self, module: nn.Module) -> bool:
        cls = base_class(module)
        if cls in self.known or calls_attention_interface(cls):
            return True
        return computes_attention(cls) and self._has_queries(module)

    @staticmethod
    def _has_queries(module: nn.Module) -> bool:
        """Whether it holds the projection of its queries."""
        names = dict(linears(module, ""))
        return not {"q", "qkv"}.isdisjoint(attention_roles(list(names)))

    def _named(self) -> list[str]:
        """Modules to put no attention adapter around, which still hold the linear layers
        of an attention.
        """
        called = re.compile(r"att(n|ention)[^.]*$")
        named = filter(called.search, self.block.modules)
        return self.block.outermost(list(filter(self.block.linears, named)))

    def _with_output(self, name: str) -> str:
        """The smallest module around an attention that also holds its output projection."""
        inner = self.block.linears(name)
        inside = [layer.removeprefix(f"{name}.") for layer in inner]
        if not all(map(spelled, inside)):  # one without a role of its own is the output
            return name
        larger = filter(
            lambda outer: len(self.block.linears(outer)) > len(inner),
            self.block.around(name),
        )
        found = next(larger, self.block.name)
        return name if found == self.block.name else found

    def _sites(self, core: str, whole: str) -> Iterator[Site]:
        """The sites of an attention: its projections, itself, and what it adds to the
        residual stream.
        """
        is_cross = CROSS.search(core.removeprefix(self.block.name))
        before = "cross-" if is_cross else ""
        projections = self._projections(core, whole)
        yield from projections
        yield from self._itself(core, f"{before}attention", projections)
        output = with_role(projections, "o")
        if output is not None:
            module = self.block.modules[core]
            yield self.block.sublayer(f"{before}attn", whole, output, module)

    def _projections(self, core: str, whole: str) -> list[Site]:
        """The linear layers in it and its output."""
        layers = self.block.linears(whole)
        inside = re.compile(f"^({re.escape(core)}|{re.escape(whole)})[.]")
        roles = attention_roles([inside.sub("", layer) for layer in layers])
        return list(map(self.block.linear, layers, roles))

    def _itself(self, core: str, role: str, projections: list[Site]) -> Iterator[Site]:
        """The site around its queries, keys and values, if the shape of its heads is told."""
        module = self.block.modules[core]
        widths = {site.role: site.out_features for site in projections}
        shape = geometry(module, widths) if self._is_attention(module) else None
        if shape is not None:
            methods = self.known.get(base_class(module), {})
            name, width = f"{core}#{role}", shape.heads * shape.head_dim
            more = {"methods": methods, **shape._asdict()}
            yield self.block.site(name, role, width, "attention", **more)
