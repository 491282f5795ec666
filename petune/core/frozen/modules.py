"""Finding the hook points of a model from its structure: no table of architectures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

Named = list[tuple[str, nn.Module]]


LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
"""Containers, which have no forward to stand around, or one that runs whatever is put into them."""


def features(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer of any make, None for anything else."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    own = vars(module)  # nn.Module is slow to say no
    if (
        "in_features" in own
        and "out_features" in own
        and hasattr(module, "weight")
        and _is_plain(base_class(module))
    ):
        return own["in_features"], own["out_features"]
    return None


@cache
def _is_plain(cls: type) -> bool:
    """A model's own subclass of nn.Linear that builds itself otherwise computes something else: a router, groups."""
    return not (
        cls.__module__.startswith("transformers.models.")
        and "__init__" in vars(cls)
        and nn.Linear in cls.__mro__
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
    """The linear layers of a module that goes by `name`, itself included."""
    return [(n, m) for n, m in walk(module, name) if features(m)]


def is_norm(module: Any) -> bool:
    """What scales by a vector, with nothing inside."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 1 and not list(children(module))


def _width(norm: Any) -> int:
    return int(norm.weight.shape[0])


def blocks(model: nn.Module, name: str = "") -> Iterator[tuple[str, int, nn.Module]]:
    """(name, index, block) of the outermost module lists, items with less than two linear layers left out."""
    for child_name, child in children(model):
        path = f"{name}.{child_name}" if name else child_name
        items = enumerate(_items(child, path)) if isinstance(child, nn.ModuleList) else ()
        found = [
            (item_name, i, item) for i, (item_name, item) in items if len(linears(item, "")) > 1
        ]
        yield from found or blocks(child, path)


def _items(modules: nn.ModuleList, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a list, and of lists in it."""
    for i, item in enumerate(modules):
        if isinstance(item, nn.ModuleList):
            yield from _items(item, f"{name}.{i}")
        else:
            yield f"{name}.{i}", item


def base_class(module: nn.Module) -> Any:
    """The class that the module has without petune."""
    return getattr(type(module), "petune_base", type(module))


HOOKED = "petune_hooked"


def hooked_forward(module: nn.Module) -> Callable[..., Any] | None:
    return vars(module).get(HOOKED)


def set_hooked_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        vars(module).pop(HOOKED, None)
    else:
        vars(module)[HOOKED] = forward


def base_forward(module: nn.Module) -> Callable[..., Any]:
    """The frozen computation of a module, without the adapters on it."""
    own = vars(module)
    hooked = own.get(HOOKED) if "petune_graft" in own else own.get("forward")
    return hooked or partial(base_class(module).forward, module)


def input_table(model: nn.Module) -> nn.Embedding | None:
    """The input embedding, None where the model has no single table."""
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (
        NotImplementedError,
        AttributeError,
    ):  # how transformers says that an architecture names none
        return None
    return table if isinstance(table, nn.Embedding) else None


def is_causal(model: nn.Module) -> bool:
    """A decoder reads left to right; an encoder's first token is the one that its classes are read from."""
    flags = [
        m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)
    ]
    return any(flags) if flags else bool(model.can_generate())  # type: ignore[operator]


def tables(model: Any) -> list[nn.Module]:
    """The modules that embed input ids: T5's stacks each have one of their own, and Gemma 3n looks ids up once
    more for each layer.
    """
    table, text = model.get_input_embeddings(), getattr(model.config, "text_config", model.config)
    size = getattr(text, "vocab_size_per_layer_input", None)
    same = [
        m
        for m in model.modules()
        if isinstance(m, nn.Embedding) and base_class(m) is base_class(table)
    ]
    return [m for m in same if m.weight.shape == table.weight.shape or m.num_embeddings == size]
