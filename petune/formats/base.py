"""What a folder of PEFT's holds of the base model's own tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from petune.core.frozen.modules import inside, walk


class Base:
    """The base model's own parameters, by name; those that are tied under each of their names."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters: dict[str, Tensor] = {
            inside(name, key): parameter
            for name, module in walk(model)
            for key, parameter in module.named_parameters(recurse=False)
        }

    def has(self, key: str, tensor: Tensor) -> bool:
        """Whether a tensor only repeats the base's: PEFT adds these where a head or an embedding is adapted."""
        own = self.parameters.get(key)
        return own is not None and same(own, tensor)


def same(one: Tensor, other: Tensor) -> bool:
    """Equal but for rounding."""
    if one.shape != other.shape:
        return False
    return torch.allclose(one.cpu().float(), other.cpu().float(), rtol=1e-5, atol=1e-6)
