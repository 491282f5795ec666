"""Finding the hook points of a model from its structure: no table of architectures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from petune.core.frozen.computes import calls_attention_interface, computes_attention
from petune.core.frozen.modules import (
    LISTS,
    _width,
    base_class,
    blocks,
    children,
    features,
    input_table,
    is_norm,
    linears,
    walk,
)
from petune.core.frozen.roles import CROSS, attention_roles, geometry, mlp_roles, spelled
from petune.core.frozen.site import Site

Attentions = Mapping[type, Mapping[str, Callable[..., Any]]]


def discover(model: nn.Module, attention: Attentions | None = None) -> list[Site]:
    """The sites that the structure shows.

    Args:
        attention: Classes of attention that do not ask transformers for their attention function, each with methods
            that do the same by `petune.attend`; they take the place of the class's own while an adapter is there.
    """
    found = list(blocks(model))
    inside = [
        s for name, i, block in found for s in _Block(name, i, block, attention or {}).sites()
    ]
    return [*_outside(model, tuple(f"{name}." for name, _, _ in found)), *inside]


def _outside(model: nn.Module, inside: tuple[str, ...]) -> Iterator[Site]:
    """What is not in a block: the prompt, the embedding, the norms around the stacks, the heads.

    Args:
        inside: What the names of modules in blocks begin with.
    """
    table = input_table(model)
    hidden = int(table.weight.shape[-1]) if table is not None else 0
    head = model.get_output_embeddings()  # type: ignore[operator]
    base = getattr(model, "base_model", model)
    around = [] if base is model else [(n, m) for n, m in children(model) if m is not base]
    top = [n for n, m in around if head not in set(m.modules()) and list(m.parameters())]
    tied = [
        m
        for _, m in walk(model)
        if table and isinstance(m, nn.Embedding) and m.weight is table.weight
    ]
    tables = [
        m for m in tied if m is not table
    ] or tied  # T5's stacks each have a module of their own for the table
    if table is not None:
        yield Site("prompt", "prompt", "prompt", None, hidden, hidden, model)
    seen_block = False
    for name, module in walk(model):
        if name.startswith(inside):
            seen_block = True
        elif module in tables:
            yield Site(name, "embedding", "embed", None, module.weight.shape[0], hidden, module)
        elif module is head and (size := features(module)):
            yield Site(name, "linear", "head", None, *size, module)
        elif name in top:
            yield Site(
                name, "module", "classifier", None, *(features(module) or (hidden, hidden)), module
            )
        elif is_norm(module):
            width = _width(module)
            yield Site(
                name, "block", "final" if seen_block else "embed-norm", None, width, width, module
            )


class _Block:
    """One repeated block: its attentions, its MLPs, its norms. Modules go by their names in the model."""

    def __init__(self, name: str, layer: int, block: nn.Module, attention: Attentions) -> None:
        self.name, self.layer, self.attention = name, layer, attention
        self.modules = dict(walk(block, name))
        widths = [_width(m) for m in self.modules.values() if is_norm(m)]
        self.hidden = max(widths, key=widths.count, default=0)

    def sites(self) -> Iterator[Site]:
        cores = [
            n for n, m in self.modules.items() if self._is_attention(m)
        ] or self._named_attentions()
        wholes = [self._with_output(core) for core in cores]
        found = [
            site
            for core, whole in zip(cores, wholes, strict=True)
            for site in self._attention(core, whole)
        ]
        self.hidden = next((s.out_features for s in found if s.role == "o"), self.hidden)
        taken = {s.name for s in found}
        found += self._mlps(
            [n for n in self._linears(self.name) if n not in taken], {*wholes} - {self.name}
        )
        inside = tuple(f"{n}." for n in cores)
        for name, module in self.modules.items():
            if is_norm(module):
                role = (
                    "qk-norm"
                    if name.startswith(inside) and spelled(name.rpartition(".")[2])
                    else "norm"
                )
                found.append(self._site(name, role, _width(module)))
        found.append(self._site(self.name, "layer", self.hidden))
        order = {n: i for i, n in enumerate(self.modules)}
        yield from sorted(found, key=lambda s: order[s.name.partition("#")[0]])

    def _site(self, name: str, role: str, width: int, kind: str = "block", **more: Any) -> Site:
        return Site(
            name, kind, role, self.layer, width, width, self.modules[name.partition("#")[0]], **more
        )

    def _linear(self, name: str, role: str) -> Site:
        module = self.modules[name]
        return Site(name, "linear", role, self.layer, *(features(module) or (0, 0)), module)

    def _linears(self, name: str) -> list[str]:
        return [n for n, _ in linears(self.modules[name], name)]

    def _around(self, name: str) -> Iterator[str]:
        """The modules around one, from the smallest to the block."""
        while name != self.name:
            name = name.rpartition(".")[0]
            yield name

    def _is_attention(self, module: nn.Module) -> bool:
        cls = base_class(module)
        if cls in self.attention or calls_attention_interface(cls):
            return True
        if not computes_attention(cls):
            return False
        return bool({"q", "qkv"} & set(attention_roles([n for n, _ in linears(module, "")])))

    def _methods(self, core: nn.Module) -> Mapping[str, Callable[..., Any]]:
        return self.attention.get(base_class(core), {})

    def _named_attentions(self) -> list[str]:
        """Modules to put no attention adapter around, which still hold the linear layers of an attention."""
        named = [
            n
            for n, m in self.modules.items()
            if re.search(r"att(n|ention)[^.]*$", n) and linears(m, n)
        ]
        return [n for n in named if not {*named} & {*self._around(n)}]

    def _attention(self, name: str, whole: str) -> Iterator[Site]:
        core = self.modules[name]
        cross = "cross-" if CROSS.search(name.removeprefix(self.name)) else ""
        layers = self._linears(whole)
        roles = attention_roles(
            [n.removeprefix(f"{name}.").removeprefix(f"{whole}.") for n in layers]
        )
        found = [self._linear(n, role) for n, role in zip(layers, roles, strict=True)]
        yield from found
        shape = (
            geometry(core, {s.role: s.out_features for s in found})
            if self._is_attention(core)
            else None
        )
        if shape is not None:
            heads, kv_heads, dim, value = shape
            more: dict[str, Any] = {
                "heads": heads,
                "kv_heads": kv_heads,
                "head_dim": dim,
                "value_dim": value,
            }
            role = f"{cross}attention"
            yield self._site(
                f"{name}#{role}",
                role,
                heads * dim,
                "attention",
                methods=self._methods(core),
                **more,
            )
        if out := next((s for s in found if s.role == "o"), None):
            yield self._sublayer(f"{cross}attn", whole, out, core)

    def _with_output(self, name: str) -> str:
        """The smallest module around an attention that also holds its output projection."""
        inner = self._linears(name)
        if any(not spelled(n.removeprefix(f"{name}.")) for n in inner):
            return name
        around = (
            n for n in self._around(name) if n != self.name and len(self._linears(n)) > len(inner)
        )
        return next(around, name)

    def _sublayer(self, role: str, name: str, out: Site, entry: nn.Module) -> Site:
        """What a sublayer adds to the residual stream. Where the norm and the sum are inside (BERT), it is seen
        between the modules: its input at `entry`, its output at the last projection.
        """
        width, whole = out.out_features, self.modules[name]
        norms = any(is_norm(m) and _width(m) == width for _, m in walk(whole))
        if name == self.name or norms or isinstance(whole, LISTS):
            return self._site(f"{out.name}#{role}", role, width, entry=entry)
        return self._site(f"{name}#{role}", role, width)

    def _mlps(self, rest: list[str], attentions: set[str]) -> Iterator[Site]:
        """The linear layers that are left, by MLP. A mixture of experts is one MLP, whatever it is made of."""
        mixtures = {n for n in self._mixtures() if not attentions & {n, *self._around(n)}}
        for name in mixtures:
            yield self._site(f"{name}#mlp", "mlp", self.hidden)
        for name, group in self._groups(rest).items():
            roles = mlp_roles(
                group, [features(self.modules[n]) or (0, 0) for n in group], self.hidden
            )
            found = [self._linear(n, role) for n, role in zip(group, roles, strict=True)]
            yield from found
            down = next((s for s in found if s.role == "down"), None)
            if down and not mixtures & {name, *self._around(name)}:
                yield self._sublayer("mlp", name, down, self.modules[group[0]])

    def _mixtures(self) -> Iterator[str]:
        """Modules around experts: around a list of MLPs, or around weights with an expert for their first dimension."""
        for name, module in self.modules.items():
            listed = (
                isinstance(module, nn.ModuleList)
                and len(module) > 1
                and all(len(linears(m, "")) > 1 for m in module)
            )
            stacked = any(p.dim() > 2 for p in module.parameters(recurse=False)) and not isinstance(
                module, nn.Conv1d
            )
            around = name.rpartition(".")[0]
            if (listed or stacked) and around.startswith(f"{self.name}."):
                yield around

    def _groups(self, names: list[str]) -> dict[str, list[str]]:
        """Linear layers by the smallest module around two or more of them."""
        shared = Counter(around for n in names for around in self._around(n))
        groups: dict[str, list[str]] = {}
        for name in names:
            around = next(n for n in self._around(name) if shared[n] > 1 or n == self.name)
            groups.setdefault(around, []).append(name)
        return groups
