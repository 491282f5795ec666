"""Finding the hook points of a model from its structure: no table of architectures."""

from __future__ import annotations

import dis
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from petune.plugins import registry
from petune.roles import CROSS, attention_roles, geometry, mlp_roles, spelled
from petune.site import Site, input_table

Named = list[tuple[str, nn.Module]]
Attentions = Mapping[type, Mapping[str, Callable[..., Any]]]
LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
"""Containers, which have no forward to stand around, or one that runs whatever is put into them."""


def find_sites(model: nn.Module) -> list[Site]:
    """Every site of a transformers model, in the order of its modules."""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    plugin: Callable[[nn.Module], list[Site]] = registry().all("petune_sites").get(kind, discover)
    return list(plugin(model))


def discover(model: nn.Module, attention: Attentions | None = None) -> list[Site]:
    """The sites that the structure shows.

    Args:
        attention: Classes of attention that do not ask transformers for their attention function, each with methods
            that do the same by `petune.attend`; they take the place of the class's own while an adapter is there.
    """
    inside = [s for name, i, block in blocks(model) for s in _Block(model, name, i, block, attention or {}).sites()]
    return [*_outside(model), *inside]


def features(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer of any make, None for anything else."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    own = vars(module)  # nn.Module is slow to say no
    if "in_features" in own and "out_features" in own and hasattr(module, "weight") and _is_plain(base_class(module)):
        return own["in_features"], own["out_features"]
    return None


@cache
def _is_plain(cls: type) -> bool:
    """A model's own subclass of nn.Linear that builds itself otherwise computes something else: a router, groups."""
    return not (
        cls.__module__.startswith("transformers.models.") and "__init__" in vars(cls) and nn.Linear in cls.__mro__
    )


def children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The base's own children: what petune put into the model is not part of it."""
    return ((name, child) for name, child in module.named_children() if name != "petune")


def walk(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` of the base alone; a linear layer is a leaf whatever a quantizer keeps inside it."""
    yield name, module
    if features(module) is None:
        for child_name, child in children(module):
            yield from walk(child, f"{name}.{child_name}" if name else child_name)


def linears(module: nn.Module, name: str) -> Named:
    return [(n, m) for n, m in walk(module, name) if features(m)]


def is_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 1 and not list(children(module))


def _width(norm: Any) -> int:
    return int(norm.weight.shape[0])


def blocks(model: nn.Module, name: str = "") -> Iterator[tuple[str, int, nn.Module]]:
    """(name, index, block) of the outermost module lists whose items hold linear layers."""
    for child_name, child in children(model):
        path = f"{name}.{child_name}" if name else child_name
        items = enumerate(_items(child, path)) if isinstance(child, nn.ModuleList) else ()
        found = [(item_name, i, item) for i, (item_name, item) in items if len(linears(item, "")) > 1]
        yield from found or blocks(child, path)


def _items(modules: nn.ModuleList, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a list, and of lists in it."""
    for i, item in enumerate(modules):
        if isinstance(item, nn.ModuleList):
            yield from _items(item, f"{name}.{i}")
        else:
            yield f"{name}.{i}", item


@cache
def calls_attention_interface(cls: Any) -> bool:
    """The class asks transformers for its attention function, so that it can be wrapped there."""
    return {"ALL_ATTENTION_FUNCTIONS", "get_interface"} <= set(inspect.unwrap(cls.forward).__code__.co_names)


@cache
def computes_attention(cls: type) -> bool:
    """The class calls a softmax and products of matrices itself, or torch's function for both."""
    functions = [f for c in cls.__mro__ if c is not nn.Module for f in vars(c).values() if isinstance(f, FunctionType)]
    steps = [step for f in functions for step in dis.get_instructions(f)]
    used = {step.argrepr if step.opname == "BINARY_OP" else step.argval for step in steps}
    product = {"matmul", "bmm", "baddbmm", "@"} & used
    return "scaled_dot_product_attention" in used or bool(product and {"softmax", "Softmax"} & used)


def base_class(module: nn.Module) -> Any:
    """The class that the module has without petune."""
    return getattr(type(module), "petune_base", type(module))


def _outside(model: nn.Module) -> Iterator[Site]:
    """What is not in a block: the prompt, the embedding, the norms around the stacks, the heads."""
    table = input_table(model)
    hidden = int(table.weight.shape[-1]) if table is not None else 0
    head = model.get_output_embeddings()  # type: ignore[operator]
    inside = tuple(name + "." for name, _, _ in blocks(model))
    base = getattr(model, "base_model", model)
    around = [] if base is model else [(n, m) for n, m in children(model) if m is not base]
    top = [n for n, m in around if head not in set(m.modules()) and list(m.parameters())]
    tied = [m for _, m in walk(model) if table and isinstance(m, nn.Embedding) and m.weight is table.weight]
    tables = [m for m in tied if m is not table] or tied  # T5's stacks each have a module of their own for the table
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
            yield Site(name, "module", "classifier", None, *(features(module) or (hidden, hidden)), module)
        elif is_norm(module):
            width = _width(module)
            yield Site(name, "block", "final" if seen_block else "embed-norm", None, width, width, module)


class _Block:
    """One repeated block: its attentions, its MLPs, its norms."""

    def __init__(self, model: nn.Module, name: str, layer: int, block: nn.Module, attention: Attentions) -> None:
        self.name, self.layer, self.block, self.attention = name, layer, block, attention
        self.config: Any = getattr(model, "config", None)
        self.all = list(walk(block, name))
        self.index = dict(self.all)
        widths = [_width(m) for _, m in self.all if is_norm(m)]
        self.hidden = max(widths, key=widths.count, default=0)

    def sites(self) -> Iterator[Site]:
        cores = list(self._cores())
        wholes = [self._with_output(name, core) for name, core in cores]
        found = [site for core, whole in zip(cores, wholes, strict=True) for site in self._attention(*core, *whole)]
        self.hidden = next((s.out_features for s in found if s.role == "o"), self.hidden)
        taken = {s.name for s in found}
        rest = {n: m for n, m in linears(self.block, self.name) if n not in taken}
        found += self._mlps(rest, tuple(f"{n}." for n, _ in [*wholes, *cores] if n != self.name))
        inside = tuple(f"{n}." for n, m in cores if self._is_attention(m))
        for name, module in self.all:
            if is_norm(module):
                role = "qk-norm" if name.startswith(inside) and spelled(name.rpartition(".")[2]) else "norm"
                found.append(self._site(name, "block", role, module, _width(module)))
        found.append(self._site(self.name, "block", "layer", self.block, self.hidden))
        order = {n: i for i, (n, _) in enumerate(self.all)}
        yield from sorted(found, key=lambda s: order[s.name.partition("#")[0]])

    def _site(self, name: str, kind: str, role: str, module: nn.Module, width: int, **more: Any) -> Site:
        return Site(name, kind, role, self.layer, width, width, module, **more)

    def _linear(self, name: str, role: str, module: nn.Module) -> Site:
        size = features(module) or (0, 0)
        return Site(name, "linear", role, self.layer, *size, module)

    def _is_attention(self, module: nn.Module) -> bool:
        cls = base_class(module)
        if cls in self.attention or calls_attention_interface(cls):
            return True
        own = attention_roles([n for n, _ in linears(module, "") if "." not in n])
        return bool({"q", "qkv"} & set(own)) and computes_attention(cls)

    def _methods(self, core: nn.Module) -> Mapping[str, Callable[..., Any]]:
        cls = base_class(core)
        if cls in self.attention or calls_attention_interface(cls):
            return self.attention.get(cls, {})
        from petune.inline import forward  # it stands on the grafts, which stand on this

        return {"forward": forward}

    def _cores(self) -> Named:
        if cores := [(n, m) for n, m in self.all if self._is_attention(m)]:
            return cores
        # nothing to put an attention adapter around, but still the attention's linear layers
        named = [(n, m) for n, m in self.all if re.search(r"att(n|ention)[^.]*$", n) and linears(m, n)]
        return [(n, m) for n, m in named if not any(n != o and _inside(n, o) for o, _ in named)]

    def _attention(self, name: str, core: nn.Module, whole_name: str, whole: nn.Module) -> Iterator[Site]:
        cross = "cross-" if CROSS.search(name.removeprefix(self.name)) else ""
        layers = linears(whole, whole_name)
        roles = attention_roles([n.removeprefix(f"{name}.").removeprefix(f"{whole_name}.") for n, _ in layers])
        for (n, module), role in zip(layers, roles, strict=True):
            yield self._linear(n, role, module)
        width = {role: (features(m) or (0, 0))[1] for (_, m), role in zip(layers, roles, strict=True)}
        shape = geometry(core, self.config, width) if self._is_attention(core) else None
        if shape is not None:
            role, (heads, _, dim, _) = f"{cross}attention", shape
            more = dict(
                zip(("heads", "kv_heads", "head_dim", "value_dim"), shape, strict=True), methods=self._methods(core)
            )
            yield self._site(f"{name}#{role}", "attention", role, core, heads * dim, **more)
        out = next((item for item, role in zip(layers, roles, strict=True) if role == "o"), None)
        if out is not None:
            yield self._sublayer(f"{cross}attn", whole_name, out, core)

    def _with_output(self, name: str, core: nn.Module) -> tuple[str, nn.Module]:
        """The smallest module around an attention that also holds its output projection."""
        inner = linears(core, name)
        if not inner or any(spelled(n.removeprefix(f"{name}.")) == "" for n, _ in inner):
            return name, core
        path = name
        while (path := path.rpartition(".")[0]) != self.name and path in self.index:
            if len(linears(self.index[path], path)) > len(inner):
                return path, self.index[path]
        return name, core

    def _sublayer(self, role: str, name: str, out: tuple[str, nn.Module], entry: nn.Module) -> Site:
        """What a sublayer adds to the residual stream. Where the norm and the sum are inside (BERT), it is seen
        between the modules: its input at `entry`, its output at the last projection.
        """
        width, whole = (features(out[1]) or (0, 0))[1], self.index[name]
        norms = any(is_norm(m) and _width(m) == width for _, m in walk(whole))
        if name == self.name or norms or isinstance(whole, LISTS):
            return self._site(f"{out[0]}#{role}", "block", role, out[1], width, entry=entry)
        return self._site(f"{name}#{role}", "block", role, whole, width)

    def _mlps(self, rest: dict[str, nn.Module], attentions: tuple[str, ...]) -> Iterator[Site]:
        """The linear layers that are left, by MLP. A mixture of experts is one MLP, whatever it is made of."""
        mixtures = [n for n in dict.fromkeys(self._mixtures()) if not f"{n}.".startswith(attentions)]
        for name in mixtures:
            yield self._site(f"{name}#mlp", "block", "mlp", self.index[name], self.hidden)
        for name, group in _groups(self.block, self.name, rest):
            roles = mlp_roles([n for n, _ in group], [features(m) or (0, 0) for _, m in group], self.hidden)
            for (n, module), role in zip(group, roles, strict=True):
                yield self._linear(n, role, module)
            alone = not any(_inside(name, mixture) for mixture in mixtures) and not f"{name}.".startswith(attentions)
            if "down" in roles and alone:
                yield self._sublayer("mlp", name, group[roles.index("down")], group[0][1])

    def _mixtures(self) -> Iterator[str]:
        """Modules around experts: around a list of MLPs, or around weights with an expert for their first dimension."""
        for name, module in self.all:
            listed = (
                isinstance(module, nn.ModuleList) and len(module) > 1 and all(len(linears(m, "")) > 1 for m in module)
            )
            stacked = any(p.dim() > 2 for p in module.parameters(recurse=False)) and not isinstance(module, nn.Conv1d)
            around = name.rpartition(".")[0]
            if (listed or stacked) and around != self.name and around in self.index:
                yield around


def _inside(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.")


def _groups(module: nn.Module, name: str, rest: dict[str, nn.Module]) -> Iterator[tuple[str, Named]]:
    """The linear layers of `rest`, each with those that share with it the smallest module around two or more."""
    own: Named = []
    for child_name, child in children(module):
        path = f"{name}.{child_name}"
        inside = [(n, m) for n, m in rest.items() if _inside(n, path)]
        if len(inside) == 1:
            own += inside
        elif inside:
            yield from _groups(child, path, rest)
    if own:
        yield name, own
