"""Finding the hook points of a model from its structure: no table of architectures."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from petune.errors import UnsupportedError
from petune.plugins import registry
from petune.site import Site, embedding_size

Named = list[tuple[str, nn.Module]]
LETTERS = {"q": "q", "query": "q", "wq": "q", "k": "k", "key": "k", "wk": "k", "v": "v", "value": "v", "wv": "v"}
LETTERS |= {"qkv": "qkv", "wqkv": "qkv", "kv": "kv", "wkv": "kv"}
CROSS = re.compile(r"cross|enc_?dec|encoder_attn", re.IGNORECASE)


def find_sites(model: nn.Module) -> list[Site]:
    """Every site of a transformers model, in the order of its modules."""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    extra = registry().all("petune_sites").get(kind)
    if extra is not None:
        return list(extra(model))
    inside = [s for name, i, block in blocks(model) for s in _Block(model, name, i, block).sites()]
    return [*_outside(model), *inside]


def features(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer of any make, None for anything else."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    sizes = vars(module).get("in_features"), vars(module).get("out_features")  # nn.Module is slow to say no
    if isinstance(sizes[0], int) and isinstance(sizes[1], int) and hasattr(module, "weight"):
        return sizes[0], sizes[1]
    return None


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
    return not list(children(module)) and weight is not None and weight.dim() == 1 and features(module) is None


def _width(norm: Any) -> int:
    return int(norm.weight.shape[0])


def blocks(model: nn.Module) -> Iterator[tuple[str, int, nn.Module]]:
    """(name, index, block) of the outermost module lists whose items hold linear layers."""
    for name, module in walk(model):
        if isinstance(module, nn.ModuleList) and not re.search(r"\.\d+\.", name):
            for i, block in enumerate(module):
                if len(linears(block, "")) > 1:
                    yield f"{name}.{i}", i, block


@cache
def calls_attention_interface(cls: Any) -> bool:
    """The class asks transformers for its attention function, so that it can be wrapped there."""
    code = getattr(inspect.unwrap(cls.forward), "__code__", None) if hasattr(cls, "forward") else None
    return code is not None and {"ALL_ATTENTION_FUNCTIONS", "get_interface"} <= set(code.co_names)


def base_class(module: nn.Module) -> Any:
    """The class that the module has without petune."""
    return getattr(type(module), "petune_base", type(module))


def _outside(model: nn.Module) -> Iterator[Site]:
    """What is not in a block: the prompt, the embedding, the norms around the stacks, the heads."""
    hidden = embedding_size(model)
    table = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    inside = tuple(name + "." for name, _, _ in blocks(model))
    base = getattr(model, "base_model", model)
    others = [(n, m) for n, m in children(model) if m is not base and head not in set(m.modules())]
    top = [] if base is model else [n for n, m in others if list(m.parameters())]
    tied = [m for _, m in walk(model) if isinstance(m, nn.Embedding) and m.weight is table.weight and m is not table]
    yield Site("prompt", "prompt", "prompt", None, hidden, hidden, model)
    seen_block = False
    for name, module in walk(model):
        if name.startswith(inside):
            seen_block = True
        elif module in (tied or [table]):  # T5's stacks each have a module of their own for the shared table
            yield Site(name, "embedding", "embed", None, table.num_embeddings, hidden, module)
        elif module is head:
            yield Site(name, "linear", "head", None, *(features(head) or (hidden, hidden)), module)
        elif name in top:
            yield Site(name, "module", "classifier", None, *(features(module) or (hidden, hidden)), module)
        elif is_norm(module):
            yield Site(name, "block", "final" if seen_block else "embed-norm", None, hidden, hidden, module)


class _Block:
    """One repeated block: its attentions, its MLP, its norms."""

    def __init__(self, model: nn.Module, name: str, layer: int, block: nn.Module) -> None:
        self.name, self.layer, self.block = name, layer, block
        self.config: Any = model.config
        self.all = list(walk(block, name))
        self.index = dict(self.all)

    def sites(self) -> Iterator[Site]:
        found = list(self._attentions())
        taken = {s.name for s in found}
        rest = [(n, m) for n, m in linears(self.block, self.name) if n not in taken]
        hidden = next((s.out_features for s in found if s.role == "o"), self.config.hidden_size)
        found += list(self._mlp(rest, hidden))
        inside = tuple(n + "." for n, m in self.all if self._is_attention(m))
        for name, module in self.all:
            if is_norm(module):
                width = _width(module)
                role = "qk-norm" if inside and name.startswith(inside) else "norm"
                found.append(Site(name, "block", role, self.layer, width, width, module))
        found.append(Site(self.name, "block", "layer", self.layer, hidden, hidden, self.block))
        order = {n: i for i, (n, _) in enumerate(self.all)}
        yield from sorted(found, key=lambda s: order[s.name.partition("#")[0]])

    def _is_attention(self, module: nn.Module) -> bool:
        return calls_attention_interface(base_class(module))

    def _attentions(self) -> Iterator[Site]:
        cores = [(n, m) for n, m in self.all if self._is_attention(m)]
        if not cores:  # no attention function to wrap, but still attention's linear layers
            named = [(n, m) for n, m in self.all if re.search(r"att(n|ention)[^.]*$", n) and linears(m, n)]
            cores = [(n, m) for n, m in named if not any(n.startswith(o + ".") for o, _ in named)]
        for name, core in cores:
            cross = "cross-" if CROSS.search(name.removeprefix(self.name)) else ""
            whole_name, whole = self._with_output(name, core)
            roles = list(_attention_roles(linears(whole, whole_name), name))
            out = [(n, m) for n, m, role in roles if role == "o"]
            for n, m, role in roles:
                size = features(m) or (0, 0)
                yield Site(n, "linear", role, self.layer, *size, m, parts=_parts(size[1], role, core))
            if self._is_attention(core):
                yield self._attention_site(name, core, cross, [(m, role) for _, m, role in roles])
            if out:
                yield self._sublayer(cross + "attn", whole_name, whole, out[-1], core)

    def _with_output(self, name: str, core: nn.Module) -> tuple[str, nn.Module]:
        """The smallest module around an attention that also holds its output projection."""
        inner = linears(core, name)
        if len(inner) != 3 or any(_letters(n) == "" for n, _ in inner):
            return name, core
        while (name := name.rpartition(".")[0]) != self.name and name in self.index:
            if len(linears(self.index[name], name)) > len(inner):
                return name, self.index[name]
        return next((n, m) for n, m in self.all if m is core)

    def _attention_site(self, name: str, core: nn.Module, cross: str, roles: list[tuple[nn.Module, str]]) -> Site:
        heads = int(getattr(self.config, "num_attention_heads", 1))
        kv_heads = int(getattr(self.config, "num_key_value_heads", None) or heads)
        width = {role: (features(m) or (0, 0))[1] for m, role in roles}
        if "q" in width:
            head_dim = width["q"] // heads
            kv_heads = width["k"] // head_dim if "k" in width else kv_heads
        elif "qkv" in width:
            head_dim = width["qkv"] // (heads + 2 * kv_heads)
        else:
            raise UnsupportedError(f"{name}: no linear layer there reads as its queries.")
        sizes = heads * head_dim, heads * head_dim
        role = cross + "attention"
        return Site(f"{name}#{role}", "attention", role, self.layer, *sizes, core, heads, kv_heads, head_dim)

    def _sublayer(self, role: str, name: str, whole: nn.Module, out: tuple[str, nn.Module], entry: nn.Module) -> Site:
        """What a sublayer adds to the residual stream. Where the norm and the sum are inside (BERT), it is seen
        between the modules: its input at `entry`, its output at the last projection.
        """
        width = (features(out[1]) or (0, 0))[1]
        if name == self.name or any(is_norm(m) and _width(m) == width for _, m in walk(whole)):
            return Site(f"{out[0]}#{role}", "block", role, self.layer, width, width, out[1], entry=entry)
        return Site(f"{name}#{role}", "block", role, self.layer, width, width, whole)

    def _mlp(self, rest: Named, hidden: int) -> Iterator[Site]:
        groups: dict[str, Named] = {}
        for name, module in rest:
            groups.setdefault(name.rpartition(".")[0], []).append((name, module))
        whole = [g for g in groups.values() if len(g) > 1]
        loose = [item for g in groups.values() if len(g) == 1 for item in g]
        for group in [*whole, loose]:
            roles = _mlp_roles(group, hidden)
            for (n, m), role in zip(group, roles, strict=True):
                yield Site(n, "linear", role, self.layer, *(features(m) or (0, 0)), m)
            down = [item for item, role in zip(group, roles, strict=True) if role == "down"]
            if down and len(whole) < 2:  # experts are many MLPs: the block around them is the layer
                path = _common([n for n, _ in group])
                path = path if path in self.index else self.name
                yield self._sublayer("mlp", path, self.index[path], down[-1], group[0][1])


def _common(names: list[str]) -> str:
    """The module that holds all of these."""
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*(n.split(".") for n in names), strict=False))
    return ".".join(parts[0] for parts in same)


def _letters(name: str) -> str:
    """The roles that the last part of a name spells: `q_proj` q, `query_key_value` qkv, `dense` none."""
    words = re.split(r"[^a-z]+", name.rpartition(".")[2].lower())
    return "".join(LETTERS.get(w, "") for w in words)


def _attention_roles(layers: Named, core: str) -> Iterator[tuple[str, nn.Module, str]]:
    spelled = {name: _letters(name) for name, _ in layers}
    unnamed = [name for name, letters in spelled.items() if not letters]
    fused = "kv" if "q" in spelled.values() else "qkv"
    complete = {"q", "k", "v"} <= set(spelled.values()) or "qkv" in spelled.values()
    for name, module in layers:
        if spelled[name]:
            yield name, module, spelled[name] if spelled[name] in ("q", "k", "v", "qkv", "kv") else "other"
        elif name == unnamed[-1]:
            yield name, module, "o"
        else:
            yield name, module, "other" if complete else fused


def _mlp_roles(group: Named, hidden: int) -> list[str]:
    sizes = [features(m) or (0, 0) for _, m in group]
    downs = [i for i, (_, o) in enumerate(sizes) if o == hidden]
    if not downs:
        return ["other"] * len(group)
    last = downs[-1]
    ups = [i for i, (n, _) in enumerate(sizes) if i != last and n == hidden and sizes[i][1] % sizes[last][0] == 0]
    gate = next((i for i in ups if "gate" in group[i][0].rpartition(".")[2]), ups[0] if len(ups) > 1 else None)
    roles = ["other"] * len(group)
    for i in ups:
        fused = sizes[i][1] == 2 * sizes[last][0]
        roles[i] = "gate_up" if fused else "gate" if i == gate and len(ups) > 1 else "up"
    roles[last] = "down"
    return roles


def _parts(width: int, role: str, core: nn.Module) -> dict[str, slice]:
    """The runs of outputs of a fused projection. Only an attention that says where it splits has known ones: others
    interleave q, k and v by head.
    """
    size = getattr(core, "split_size", None)
    if not isinstance(size, int) or role not in ("qkv", "kv") or width != len(role) * size:
        return {}
    return {letter: slice(i * size, (i + 1) * size) for i, letter in enumerate(role)}
