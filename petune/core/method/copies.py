"""Copies of what the base has, which train in its place: a new task's head, or what an `Unfreeze` picked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from petune.core.host.torch_modules import put_parameter
from petune.core.method.adapter import Adapter, Inner


class TrainedCopy(Adapter):
    """A float32 copy of a base module that takes its place."""

    mergeable = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inner: Inner, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class TrainedParameters(TrainedCopy):
    """Float32 copies of all the parameters of a module that reads those of its submodules too.

    While the module runs they take the places of the base's. So nothing else may run the module meanwhile.

    Args:
        owners: The modules of the base in it, itself included, by name; each with floating-point parameters.
    """

    def __init__(self, owners: Mapping[str, nn.Module]) -> None:
        super().__init__(nn.ParameterDict())
        # in a dict, not as attributes: the base's modules are no part of the adapter
        self.owner_of: dict[str, tuple[nn.Module, str]] = {}
        for path, owner in owners.items():
            for name, parameter in owner.named_parameters(recurse=False):
                key = f"{path}.{name}".lstrip(".").replace(".", "/")
                self.copies[key] = nn.Parameter(parameter.detach().clone())
                self.owner_of[key] = owner, name

    @property
    def copies(self) -> Any:
        """The trained copies, by the path of what each stands for."""
        return self.module

    def forward(self, inner: Inner, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        before = {
            key: owner.get_parameter(name)
            for key, (owner, name) in self.owner_of.items()
        }
        try:
            for key, (owner, name) in self.owner_of.items():
                put_parameter(owner, name, self.copies[key].to(before[key].dtype))
            return inner(x)
        finally:
            for key, (owner, name) in self.owner_of.items():
                put_parameter(owner, name, before[key])

    def write(self) -> None:
        """Put the values into the base for good."""
        for key, (owner, name) in self.owner_of.items():
            dtype = owner.get_parameter(name).dtype
            value = self.copies[key].detach().to(dtype)
            put_parameter(owner, name, nn.Parameter(value, requires_grad=False))
