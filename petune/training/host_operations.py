"""What recomputing leans on in torch's operations that has no public name, each with a check that it still holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from petune.core.host.seam import Seams

SEAMS = Seams()


@SEAMS.lean(
    "torch",
    "OpOverload.is_view, its _schema.is_mutable, and torch.Tag.pointwise",
    since="2.3",
    why="tell which operations are cheap to compute again",
)
def _operations_tell_what_they_are() -> bool:
    aten = torch.ops.aten
    views = is_view(aten.transpose.int) and not is_view(aten.add.Tensor)
    writes = is_writing(aten.add_.Tensor) and not is_writing(aten.add.Tensor)
    pointwise = all(
        torch.Tag.pointwise in operation.tags
        for operation in (aten.gelu.default, aten.silu.default, aten.mul.Tensor)
    )
    is_product = torch.Tag.pointwise in aten.mm.default.tags
    return views and writes and pointwise and not is_product


def is_view(operation: Any) -> bool:
    """Whether an operation's result shares the memory of its input."""
    return bool(operation.is_view)


def is_writing(operation: Any) -> bool:
    """Whether an operation changes one of its inputs."""
    return bool(operation._schema.is_mutable)


def plain_name(operation: Any) -> str:
    """`aten::add.Tensor` is called `add`."""
    return str(operation._schema.name).rpartition("::")[2]


def written(operation: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among its inputs that an operation changes."""
    found = []
    for i, argument in enumerate(operation._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        values = value if isinstance(value, list | tuple) else [value]
        found += [one for one in values if isinstance(one, Tensor)]
    return found


@SEAMS.lean(
    "torch",
    "TorchDispatchMode, which sees the tensors that autograd keeps",
    since="2.0",
    why="know how what is kept for backward was computed",
)
def _modes_see_what_is_kept() -> bool:
    seen: list[Tensor] = []
    kept: list[Tensor] = []

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = operation(*args, **(kwargs or {}))
            seen.append(out)
            return out

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.ones(3, 2, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    watch = Watch()  # type: ignore[no-untyped-call]
    with torch.enable_grad(), watch, hooks:
        doubled = x * 2
        doubled.t().exp()
    whole, result = seen[0], seen[-1]
    is_base = base_of(doubled.t()) is whole
    return whole is doubled and is_base and any(one is result for one in kept)


def base_of(tensor: Tensor) -> Tensor | None:
    """The tensor that a view is a part of, None for one that has memory of its own."""
    return tensor._base


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    return tensor._version
