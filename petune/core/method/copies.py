"""What a method is: an `Adapter` around one computation of the frozen model, or an `Unfreeze` of parts of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from petune.core.method.adapter import Adapter, Inner


class TrainedCopy(Adapter):
    """A float32 copy of a base module that takes its place: a new task's head, or a layer that `Unfreeze` picked."""

    mergeable = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inner: Inner, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class TrainedParameters(TrainedCopy):
    """Float32 copies of all the parameters in a module that holds some itself, for which it reads those of its
    submodules too: they take the places of the base's while it runs.

    Args:
        owners: The modules of the base in it, itself included, by name; each with floating-point parameters.
    """

    def __init__(self, owners: Mapping[str, nn.Module]) -> None:
        super().__init__(nn.ParameterDict())
        copies: Any = self.module
        self.places: dict[
            str, tuple[nn.Module, str]
        ] = {}  # in a dict: the base's modules are no part of the adapter
        for path, owner in owners.items():
            for name, p in owner.named_parameters(recurse=False):
                key = f"{path}.{name}".lstrip(".").replace(".", "/")
                copies[key] = nn.Parameter(p.detach().clone())
                self.places[key] = owner, name

    def forward(self, inner: Inner, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        before: dict[str, Any] = {
            key: owner._parameters[name] for key, (owner, name) in self.places.items()
        }
        copies: Any = self.module
        try:
            for key, (owner, name) in self.places.items():
                owner._parameters[name] = copies[key].to(before[key].dtype)
            return inner(x)
        finally:
            for key, (owner, name) in self.places.items():
                owner._parameters[name] = before[key]

    def write(self) -> None:
        """Put the values into the base."""
        copies: Any = self.module
        for key, (owner, name) in self.places.items():
            dtype = owner.get_parameter(name).dtype
            owner._parameters[name] = nn.Parameter(
                copies[key].detach().to(dtype), requires_grad=False
            )
