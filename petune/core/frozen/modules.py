"""The modules of the base as they are without petune: their classes, their children, their own forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

Named = list[tuple[str, nn.Module]]
"""Modules by their names in the model."""
LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
"""Containers, which have no forward to stand around, or one that runs whatever is put into them."""
HOOKED = "petune_hooked"
"""The attribute of an adapted module for a `forward` that someone (accelerate) had put on the instance."""


def base_class(module: nn.Module) -> Any:
    """The class that the module has without petune."""
    return getattr(type(module), "petune_base", type(module))


def hooked_forward(module: nn.Module) -> Callable[..., Any] | None:
    """What an adapted module computes in place of its class's forward, None if that."""
    return module.__dict__.get(HOOKED)


def set_hooked_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Let an adapted module compute something else than its class's forward; None takes that back."""
    module.__dict__.pop(HOOKED, None)
    if forward is not None:
        module.__dict__[HOOKED] = forward


def base_forward(module: nn.Module) -> Callable[..., Any]:
    """The frozen computation of a module, without the adapters on it."""
    own = module.__dict__
    hooked = own.get(HOOKED) if "petune_graft" in own else own.get("forward")
    return partial(base_class(module).forward, module) if hooked is None else hooked


def features(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer of any make, None for anything else."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    own = module.__dict__  # nn.Module is slow to say no
    if not {"in_features", "out_features"} <= own.keys():
        return None
    is_linear = hasattr(module, "weight") and _is_plain(base_class(module))
    return (own["in_features"], own["out_features"]) if is_linear else None


@cache
def _is_plain(cls: type) -> bool:
    """A model's own subclass of nn.Linear that builds itself otherwise computes something else: a router, groups."""
    is_a_models_own = cls.__module__.startswith("transformers.models.")
    is_a_subclass = nn.Linear in cls.__mro__
    builds_itself = "__init__" in vars(cls)
    return not all((is_a_models_own, is_a_subclass, builds_itself))


def is_norm(module: Any) -> bool:
    """Whether the module scales by a vector, with nothing inside."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1:
        return False
    inner = dict(children(module))
    return not inner


def width_of(norm: Any) -> int:
    """How many features a norm scales."""
    return int(norm.weight.shape[0])


def children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The base's own children: what petune put into the model is not part of it."""
    inner = dict(module.named_children())
    inner.pop("petune", None)
    yield from inner.items()


def inside(name: str, child: str) -> str:
    """The name of a child in the model, by its parent's there."""
    return f"{name}.{child}".removeprefix(".")


def walk(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` of the base alone; a linear layer is a leaf whatever a quantizer keeps inside it."""
    yield name, module
    if features(module) is None:
        for child_name, child in children(module):
            yield from walk(child, inside(name, child_name))


def linears(module: nn.Module, name: str) -> Named:
    """The linear layers of a module that goes by `name`, itself included."""
    return [named for named in walk(module, name) if features(named[1])]
