"""What of torch's modules and tensors has no public name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from petune.core.host.seam import Seams

SEAMS = Seams()


@SEAMS.lean(
    "torch",
    "nn.Module._parameters",
    since="1.0",
    why="let a module run with other tensors in the places of its parameters",
)
def _parameters_are_a_dict() -> bool:
    layer = nn.LayerNorm(1)  # which draws nothing at random
    other = torch.ones(1)
    put_parameter(layer, "weight", other)
    return layer.weight is other


def put_parameter(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Let a module find `tensor`, which need not be a Parameter, where its parameter `name` stood."""
    module._parameters[name] = tensor  # type: ignore[assignment]


@SEAMS.lean(
    "torch",
    "nn.Module._modules",
    since="1.0",
    why="put adapters into a module and take them out in the order in which they stood",
)
def _modules_are_a_dict() -> bool:
    layer = nn.Identity()
    layer.add_module("inner", nn.Identity())
    return list(children_of(layer)) == ["inner"]


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The module's own dict of submodules; changing it changes the module."""
    return module._modules


@SEAMS.lean(
    "torch",
    "torch.ops.aten._unsafe_view",
    since="1.5",
    why="give a result its shape without making it a view, since models change it in place",
)
def _an_unsafe_view_is_none() -> bool:
    base = torch.zeros(2, 3)
    seen = unsafe_view(base, (3, 2))
    return not seen._is_view() and seen.data_ptr() == base.data_ptr()


def unsafe_view(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor in another shape, which autograd does not take for a view of it: `tensor` must not be used again."""
    out: Tensor = torch.ops.aten._unsafe_view(tensor, shape)
    return out


@SEAMS.lean(
    "torch",
    "torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs)",
    since="2.0",
    why="know the shapes of an adapter's tensors before there is memory for them",
)
def _tensors_can_be_without_memory() -> bool:
    one = torch.ones(1)
    with without_memory():
        made = torch.empty(1 << 60) + one
    return made.shape == (1 << 60,) and one.item() == 1


@contextmanager
def without_memory() -> Iterator[None]:
    """Within the context tensors have a shape and a dtype, and no values; those made before may be read."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
