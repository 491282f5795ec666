"""How large a tensor may be that a saved tuning asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from petune.core.attached.saved import Form
from petune.core.frozen.modules import features
from petune.errors import PetuneError

LEAST = 1 << 26
"""Numbers that any tensor may have: 256 MB of float32."""
TIMES = 4
"""How many times the largest tensor of the file or the model: methods draw some that they don't save."""
MAKERS = {
    torch.arange,
    torch.empty,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.ones,
    torch.rand,
    torch.randint,
    torch.randn,
    torch.randperm,
    torch.tril_indices,
    torch.triu_indices,
    torch.zeros,
}
"""What makes tensors of a size that is asked for."""


class Room(TorchFunctionMode):
    """Within the context a tensor of more numbers than `most` is refused before there is memory for it.

    Args:
        file: what asks for it, for the message.
    """

    def __init__(self, most: int, file: Path) -> None:
        super().__init__()
        self.most, self.file = most, file

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func in MAKERS:
            self._check(func, args, given)
        return func(*args, **given)

    def _check(
        self, func: Callable[..., Any], args: tuple[Any, ...], given: dict[str, Any]
    ) -> None:
        without = {key: given[key] for key in given if key not in ("generator", "out")}
        shape = tuple(func(*args, **{**without, "device": "meta"}).shape)
        if math.prod(shape) > self.most:
            what = f"its arguments ask for a tensor of shape {shape}"
            raise PetuneError(f"{self.file}: {what}, far beyond what the model has.")


def room_for(model: nn.Module, saved: Mapping[str, Form], file: Path) -> Room:
    """Room for a saved tuning's adapters on a model."""
    sizes = [math.prod(form.shape) for form in saved.values()]
    sizes += [parameter.numel() for parameter in model.parameters()]
    sizes += [math.prod(features(module) or (0,)) for module in model.modules()]
    return Room(max(LEAST, TIMES * max(sizes, default=0)), file)
