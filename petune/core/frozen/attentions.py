"""The attentions of a block: where each begins and ends, its projections, and the shape of its heads."""

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
from petune.core.frozen.site import Site

Methods = Mapping[str, Callable[..., Any]]
Known = Mapping[type, Methods]
"""Classes of attention that are told, each with methods that do the same by `petune.attend`."""


class Attentions:
    """The attentions of a block.

    Attributes:
        cores: the names of the modules that compute attention, or, where none is found, of those that are called so.
        wholes: for each the name of the smallest module around it that also holds its output projection.
    """

    def __init__(self, block: Block, known: Known) -> None:
        self.block, self.known = block, known
        found = [name for name, module in block.modules.items() if self._is_attention(module)]
        self.cores = found or self._named()
        self.wholes = [self._with_output(core) for core in self.cores]

    def sites(self) -> Iterator[Site]:
        """The sites of all of them."""
        for core, whole in zip(self.cores, self.wholes, strict=True):
            yield from self._sites(core, whole)

    def holds(self, name: str) -> bool:
        """Whether a module stands in one of them."""
        return name.startswith(tuple(f"{core}." for core in self.cores))

    def _is_attention(self, module: nn.Module) -> bool:
        cls = base_class(module)
        if cls in self.known or calls_attention_interface(cls):
            return True
        if not computes_attention(cls):
            return False
        roles = attention_roles([name for name, _ in linears(module, "")])
        return not {"q", "qkv"}.isdisjoint(roles)

    def _named(self) -> list[str]:
        """Modules to put no attention adapter around, which still hold the linear layers of an attention."""
        called = [name for name in self.block.modules if re.search(r"att(n|ention)[^.]*$", name)]
        return self.block.outermost([name for name in called if self.block.linears(name)])

    def _with_output(self, name: str) -> str:
        """The smallest module around an attention that also holds its output projection."""
        inner = self.block.linears(name)
        names = [layer.removeprefix(f"{name}.") for layer in inner]
        if not all(map(spelled, names)):  # a layer without a role of its own is the output
            return name
        for around in self.block.around(name):
            if around != self.block.name and len(self.block.linears(around)) > len(inner):
                return around
        return name

    def _sites(self, core: str, whole: str) -> Iterator[Site]:
        """An attention's sites: its projections, itself, and what it adds to the residual stream."""
        is_cross = CROSS.search(core.removeprefix(self.block.name))
        before = "cross-" if is_cross else ""
        projections = self._projections(core, whole)
        yield from projections
        yield from self._itself(core, f"{before}attention", projections)
        outputs = [site for site in projections if site.role == "o"]
        if outputs:
            module = self.block.modules[core]
            yield self.block.sublayer(f"{before}attn", whole, outputs[0], module)

    def _projections(self, core: str, whole: str) -> list[Site]:
        layers = self.block.linears(whole)
        names = [layer.removeprefix(f"{core}.").removeprefix(f"{whole}.") for layer in layers]
        roles = attention_roles(names)
        return [self.block.linear(layer, role) for layer, role in zip(layers, roles, strict=True)]

    def _itself(self, core: str, role: str, projections: list[Site]) -> Iterator[Site]:
        """The site around its queries, keys and values, if the shape of its heads is told."""
        module = self.block.modules[core]
        if not self._is_attention(module):
            return
        shape = geometry(module, {site.role: site.out_features for site in projections})
        if shape is None:
            return
        methods = self.known.get(base_class(module), {})
        width = shape.heads * shape.head_dim
        name = f"{core}#{role}"
        yield self.block.site(name, role, width, "attention", methods=methods, **shape._asdict())
